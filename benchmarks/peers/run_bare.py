"""No framework: train every site from the same start, average."""

import torch
from work import Work, main, orders, timed, train_epoch, weights_of


def run(work: Work):
    data, order, model = work.data(), orders(work), work.model()
    state = {name: leaf.clone() for name, leaf in model.state_dict().items()}

    def loop() -> None:
        nonlocal state
        for r in range(work.rounds):
            names = work.cohort(r)
            weight = sum(len(data[site][1]) for site in names)
            total = {name: torch.zeros_like(leaf) for name, leaf in state.items()}
            for site in names:
                x, y = data[site]
                model.load_state_dict(state)
                train_epoch(model, x, y, order[site, r])
                for name, leaf in model.state_dict().items():
                    total[name].add_(leaf, alpha=len(y) / weight)
            state = total

    loop_cpu = timed(loop)
    model.load_state_dict(state)
    return weights_of(model), loop_cpu


if __name__ == "__main__":
    main("bare", run)
