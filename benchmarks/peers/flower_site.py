"""The client of Flower's simulation, in a module that the processes of Ray can import."""

import functools

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from work import WORKS, orders, train_epoch

client_app = ClientApp()


@functools.cache
def prepared(name: str):
    """Return the data, the orders, a model and the sites of a work, once in each process."""
    work = WORKS[name]
    return work.data(), orders(work), work.model(), work.names()


@client_app.train()
def train(message, context):
    config = message.content["config"]
    data, order, model, names = prepared(config["work"])
    site = names[context.node_config["partition-id"]]
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    x, y = data[site]
    train_epoch(model, x, y, order[site, config["server-round"] - 1])
    content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": len(y)})}
    return Message(RecordDict(content), reply_to=message)
