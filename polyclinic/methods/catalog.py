"""The table of methods: what a study may name. Plain data, so that listing it imports no numerical library.

A new method is one file and one line here. ``make`` is the function that builds it; its arguments after ``task`` and
``local`` become the keys that a study file may set, with their defaults.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Needs = Literal["classification", "multilabel", "segmentation", "regression", "reconstruction"]
Way = Literal["dp-sgd", "gaussian"]


@dataclass(frozen=True)
class Entry:
    """One method by name.

    Attributes:
        name: As in a study file.
        make: ``module:function`` under ``polyclinic.methods``.
        summary: One line for people.
        paper: Whom to cite.
        leaves: What leaves a site, in words; "nothing" where nothing does.
        baseline: Whether it is something to compare with rather than federated learning.
        pooled: Whether its data lie in one place.
        tasks: The kinds of task it is for; any where empty.
        stateful: Whether sites keep something between rounds.
        unlabeled: Whether a site without any labels takes part. Elsewhere it is only judged.
        newcomers: Whether there is a model for a site that never trained.
        uplink: What its replies pass through where a study says nothing: transforms that are part of the method's paper.
        private: In which ways everything that leaves is covered by an ε: "dp-sgd" where sites train with it, "gaussian"
            where replies pass a clip and noise (or the sparse vector technique). ``tests/attacks/test_release_audit.py`` runs
            the release audit on every method and holds it to this.
        exposes: What leaves beside the noise, or why there is no such way; for whoever is refused.
    """

    name: str
    make: str
    summary: str
    paper: str
    leaves: str = "the change of the model"
    baseline: bool = False
    pooled: bool = False
    tasks: tuple[Needs, ...] = ()
    stateful: bool = False
    unlabeled: bool = False
    newcomers: bool = True
    uplink: tuple[str, ...] = ()
    private: tuple[Way, ...] = ()
    exposes: str = ""


BOTH: tuple[Way, ...] = ("dp-sgd", "gaussian")
SEEN = "the change of the model, which the server sees site by site"

# By the survey's taxonomy (Guan, Yap, Bozoki and Liu, "Federated learning for medical image analysis", 2024).
FAMILIES: Mapping[str, tuple[Entry, ...]] = {
    "Baselines": (
        Entry(
            "local",
            "optimization.baselines:LocalOnly",
            "every site trains alone",
            "Guan et al. 2024",
            "nothing",
            baseline=True,
            stateful=True,
            newcomers=False,
            private=BOTH,
        ),
        Entry(
            "cross",
            "optimization.baselines:Cross",
            "every site is tested with another's model",
            "Guan et al. 2024",
            "the model",
            baseline=True,
            stateful=True,
            newcomers=False,
            private=("dp-sgd",),
        ),
        Entry(
            "pooled",
            "optimization.baselines:pooled",
            "all data in one place",
            "Guan et al. 2024",
            "the data",
            baseline=True,
            pooled=True,
            private=("dp-sgd",),
        ),
    ),
    "Federated optimization": (
        Entry("fedavg", "optimization.fedavg:FedAvg", "federated averaging", "McMahan et al. 2017", private=BOTH),
        Entry(
            "fedsgd",
            "optimization.fedsgd:fedsgd",
            "one full-batch gradient a round",
            "McMahan et al. 2017",
            "a gradient",
            private=("gaussian",),
            exposes="its gradient is that of all training patients, exact",
        ),
        Entry(
            "fedprox",
            "optimization.fedprox:fedprox",
            "sites held near where they started",
            "Li et al. 2020 (MLSys)",
            private=BOTH,
        ),
        Entry(
            "scaffold",
            "optimization.scaffold:Scaffold",
            "control variates against drift",
            "Karimireddy et al. 2020",
            "the change of the model and of a control variate",
            stateful=True,
            private=BOTH,
        ),
        Entry("fedavgm", "optimization.fedopt:fedavgm", "momentum at the server", "Hsu et al. 2019", private=BOTH),
        Entry(
            "fedadagrad", "optimization.fedopt:fedadagrad", "Adagrad at the server", "Reddi et al. 2021", private=BOTH
        ),
        Entry("fedadam", "optimization.fedopt:fedadam", "Adam at the server", "Reddi et al. 2021", private=BOTH),
        Entry("fedyogi", "optimization.fedopt:fedyogi", "Yogi at the server", "Reddi et al. 2021", private=BOTH),
        Entry(
            "feddyn",
            "optimization.feddyn:FedDyn",
            "sites' objectives bent towards a common minimum",
            "Acar et al. 2021",
            stateful=True,
            private=BOTH,
        ),
        Entry(
            "mime",
            "optimization.mime:mime",
            "local steps with the server's momentum, corrected against drift",
            "Karimireddy et al. 2021 (NeurIPS)",
            "a gradient, and the change of the model",
            private=("gaussian",),
            exposes="it sends the exact gradient of all training patients",
        ),
        Entry(
            "mime-lite",
            "optimization.mime:mime_lite",
            "local steps with the server's momentum",
            "Karimireddy et al. 2021 (NeurIPS)",
            "the change of the model, and a gradient",
            private=("gaussian",),
            exposes="beside the update it sends the exact gradient of all training patients",
        ),
    ),
    "Client end: domain-specific learning": (
        Entry(
            "fedbn",
            "personalization.partial_personalization:fedbn",
            "normalization layers stay at the sites",
            "Li et al. 2021 (ICLR)",
            "the change of all but normalization layers",
            stateful=True,
            private=BOTH,
        ),
        Entry(
            "silobn",
            "personalization.partial_personalization:silobn",
            "running statistics stay at the sites",
            "Andreux et al. 2020",
            "the change of all but running statistics",
            stateful=True,
            private=BOTH,
        ),
        Entry(
            "fedper",
            "personalization.partial_personalization:fedper",
            "the head stays at the sites (FedPer, FLOP)",
            "Arivazhagan et al. 2019; Yang et al. 2021 (KDD)",
            "the change of all but the head",
            stateful=True,
            private=BOTH,
        ),
        Entry(
            "lg-fedavg",
            "personalization.partial_personalization:lg_fedavg",
            "the representation stays at the sites",
            "Liang et al. 2020",
            "the change of the head",
            stateful=True,
            private=BOTH,
        ),
        Entry(
            "ditto",
            "personalization.ditto:ditto",
            "a personal model beside the global one, drawn towards it",
            "Li et al. 2021 (ICML)",
            stateful=True,
            private=BOTH,
        ),
        Entry(
            "pfedme",
            "personalization.pfedme:PFedMe",
            "personal models near a shared one, which follows them",
            "T. Dinh et al. 2020 (NeurIPS)",
            stateful=True,
            private=("gaussian",),
            exposes="it takes its training steps by itself",
        ),
        Entry(
            "apfl",
            "personalization.apfl:APFL",
            "each site predicts with a learned mixture of its own model and the shared one",
            "Deng et al. 2020",
            stateful=True,
            private=("gaussian",),
            exposes="it takes its training steps by itself",
        ),
        Entry(
            "fedrep",
            "personalization.fedrep:fedrep",
            "heads stay at the sites and are fitted before the representation",
            "Collins et al. 2021",
            "the change of all but the head",
            stateful=True,
            private=BOTH,
        ),
        Entry(
            "moon",
            "personalization.moon:Moon",
            "sites keep their representation near the global model's",
            "Li et al. 2021 (CVPR)",
            stateful=True,
            private=BOTH,
        ),
        Entry(
            "ifca",
            "personalization.ifca:IFCA",
            "several models; each site trains the one that fits it best",
            "Ghosh et al. 2020",
            "the change of every cluster's model, 0 for those that the site is not in",
            stateful=True,
            private=("gaussian",),
            exposes="which cluster a site chose shows its training loss",
        ),
        Entry(
            "feddg",
            "personalization.feddg:FedDG",
            "sites practice in the styles of the others, for hospitals not yet seen",
            "Liu et al. 2021 (CVPR)",
            "low-frequency amplitude spectra of some images, once and kept apart by site, and seen by the other sites; then the change of the model",
            exposes="it sends amplitude spectra of single images",
        ),
        Entry(
            "fedsm",
            "personalization.fedsm:FedSM",
            "a global model, personal ones, and a selector between them",
            "Xu et al. 2022 (CVPR)",
            "the change of the global model and of the selector; the personal model, kept apart by site",
            exposes="it sends a selector that was trained without privacy",
        ),
        Entry(
            "iop-fl",
            "personalization.iopfl:IOPFL",
            "personal models inside; outside, a mixture of them found at test time",
            "Jiang et al. 2023 (TMI)",
            "the change of the model; the personal model, kept apart by site",
            tasks=("classification", "segmentation"),
            stateful=True,
            private=("dp-sgd",),
        ),
        Entry(
            "fednorm",
            "personalization.fednorm:fednorm",
            "one model for several modalities, with normalization layers for each",
            "Bernecker et al. 2022",
            "the change of the model, and which modality the site has",
            private=BOTH,
        ),
        Entry(
            "fedmri",
            "personalization.fedmri:fedmri",
            "a shared encoder, a private decoder, and a contrast of encoders",
            "Feng et al. 2022 (TMI)",
            "the change of the encoder; with `others`, the encoder, kept apart by site",
            stateful=True,
            private=BOTH,
        ),
        Entry(
            "site-graph",
            "personalization.site_graph:site_graph",
            "a shared CNN and, at each site, a graph network over its labels",
            "Chakravarty et al. 2021 (ISBI)",
            "the change of all but the graph network",
            tasks=("multilabel", "classification"),
            stateful=True,
            private=("gaussian",),
            exposes="the labels of all training patients enter every gradient as a graph",
        ),
        Entry(
            "lc-fed",
            "personalization.lcfed:LCFed",
            "channels chosen for each site, and heads calibrated where sites disagree",
            "Wang et al. 2022 (ECCV)",
            "the change of all but the head; the head, kept apart by site and seen by the other sites",
            tasks=("segmentation",),
            stateful=True,
            exposes="its loss cannot be taken example by example",
        ),
    ),
    "Client end: domain adaptation": (
        Entry(
            "fed-align",
            "domain_adaptation.fedalign:FedAlign",
            "features that discriminators cannot tell apart by site",
            "Li et al. 2020 (Medical Image Analysis)",
            "the change of the model; noisy features of some examples, and a discriminator, each kept apart by site",
            stateful=True,
            exposes="it takes its training steps by itself",
        ),
        Entry(
            "fed-moe",
            "domain_adaptation.fedmoe:fed_moe",
            "a federated and a private model, mixed by a private gate",
            "Li et al. 2020 (Medical Image Analysis)",
            "the change of the federated expert",
            stateful=True,
            private=BOTH,
        ),
        Entry(
            "fedharmony",
            "domain_adaptation.fedharmony:FedHarmony",
            "features that do not tell which scanner they come from",
            "Dinsdale et al. 2022",
            "the change of the model and of a domain classifier; mean and deviation of features, kept apart by site",
            exposes="it takes its training steps by itself",
        ),
        Entry(
            "fl-mrcm",
            "domain_adaptation.mrcm:mrcm",
            "sites with truth, aligned to one without",
            "Guo et al. 2021 (CVPR)",
            "the change of the model; of the target instead, latent features of some examples, kept apart",
            stateful=True,
            exposes="it takes its training steps by itself, and sends latent features of single examples",
        ),
    ),
    "Client end: image harmonization": (
        Entry(
            "harmofl",
            "harmonization.harmofl:harmofl",
            "one amplitude spectrum for all images, and flat minima",
            "Jiang et al. 2022 (AAAI)",
            "the mean amplitude spectrum of the site's images, once, then the change of the model",
            private=("gaussian",),
            exposes="it takes its training steps by itself",
        ),
        Entry(
            "zscore",
            "harmonization.zscore:zscore",
            "inputs of mean 0 and deviation 1, over all sites or within each",
            "textbook",
            "sums and sums of squares of the data, once, then the change of the model",
            stateful=True,
            exposes="it sends sums of the data, exact",
        ),
        Entry(
            "combat",
            "harmonization.combat:combat",
            "each scanner's offset and scale, taken out of every feature",
            "Johnson et al. 2007; Chen et al. 2022 (NeuroImage)",
            "the site's sums of features and of squared residuals, once, then the change of the model",
            stateful=True,
            private=("gaussian",),
            exposes="it sends sums of features, exact, and they enter every gradient",
        ),
        Entry(
            "vafl",
            "harmonization.vafl:vafl",
            "every site's images in the style of the one that varies least",
            "Yan et al. 2021 (JBHI)",
            "how much the site's images vary, and from one site made images, kept apart by site; then the change of the model",
            stateful=True,
            exposes="it sends how much the images vary, exact, and made images",
        ),
        Entry(
            "stain-norm",
            "harmonization.stain_norm:stain_norm",
            "one generator gives all sites' images a common style",
            "Ke et al. 2021 (ISBI)",
            "the change of a generator of images, then that of the model",
            stateful=True,
            exposes="it sends a generator that was trained without privacy",
        ),
        Entry(
            "histogram-match",
            "harmonization.histogram_match:histogram_match",
            "every site's gray values get the quantiles of all sites' together",
            "Nyúl and Udupa 1999",
            "counts, moments and histograms of the data, once, as sums; then the change of the model",
            stateful=True,
            exposes="it sends histograms of the data, exact",
        ),
    ),
    "Client end: contrastive and self-supervised learning": (
        Entry(
            "fedmoco",
            "self_supervised.fedmoco:fedmoco",
            "momentum contrast with negatives from other sites' feature statistics",
            "Dong and Voiculescu 2021",
            "the change of the model; mean and covariance of image features",
            stateful=True,
            unlabeled=True,
            exposes="it trains on examples of its own making, which do not say whose they are",
        ),
        Entry(
            "fedmae",
            "self_supervised.fedmae:fedmae",
            "learns to fill in what is hidden, then from labels",
            "Yan et al. 2023",
            unlabeled=True,
            private=("gaussian",),
            exposes="it trains on examples of its own making, which do not say whose they are",
        ),
        Entry(
            "fcl",
            "self_supervised.fcl:fcl",
            "contrast between parts of the body, with other sites' features",
            "Wu et al. 2021 (MICCAI)",
            "the change of the model; features of single images",
            stateful=True,
            unlabeled=True,
            exposes="it trains on examples of its own making, which do not say whose they are",
        ),
    ),
    "Client end: multi-task learning": (
        Entry(
            "fmtl",
            "multitask.fmtl:fmtl",
            "shared experts, private gates and towers",
            "Huang et al. 2023",
            "the change of the encoder and of the experts",
            tasks=("classification",),
            stateful=True,
            private=BOTH,
        ),
        Entry(
            "private-heads",
            "multitask.private_heads:private_heads",
            "a shared encoder, and a head for each site's classes",
            "Parekh et al. 2021",
            "the change of the encoder",
            stateful=True,
            private=BOTH,
        ),
    ),
    "Client end: weakly and semi-supervised learning": (
        Entry(
            "fedirm",
            "semi_supervised.fedirm:fedirm",
            "sites without labels match how classes relate elsewhere",
            "Liu et al. 2021 (MICCAI)",
            "the change of the model, and how classes relate in its eyes",
            tasks=("classification",),
            stateful=True,
            unlabeled=True,
            private=("gaussian",),
            exposes="its loss cannot be taken example by example",
        ),
        Entry(
            "fedsemi",
            "semi_supervised.fedsemi:fedsemi",
            "sites without labels learn from sure predictions",
            "Yang et al. 2021 (MedIA)",
            tasks=("segmentation", "classification"),
            unlabeled=True,
            private=("gaussian",),
            exposes="it takes its training steps by itself",
        ),
        Entry(
            "fedperl",
            "semi_supervised.fedperl:fedperl",
            "similar peers help to label, unknown to one another",
            "Bdair et al. 2021",
            "the model, seen by the server alone; others receive averages",
            tasks=("classification", "segmentation"),
            unlabeled=True,
            exposes="its loss cannot be taken example by example",
        ),
        Entry(
            "fedmix",
            "semi_supervised.fedmix:fedmix",
            "masks, boxes, labels of images or nothing, by two networks that agree",
            "Wicaksana et al. 2023",
            "the change of two models, how many images it used, and their loss",
            tasks=("segmentation",),
            stateful=True,
            unlabeled=True,
            exposes="its loss cannot be taken example by example",
        ),
        Entry(
            "histofl",
            "semi_supervised.histofl:HistoFL",
            "slides as bags of patches, weights sent with uncalibrated noise",
            "Lu et al. 2022 (MedIA)",
            "the change of the model, blurred",
            private=BOTH,
        ),
        Entry(
            "fedcy",
            "semi_supervised.fedcy:FedCy",
            "videos without labels learn from the order of time",
            "Kassem et al. 2023",
            tasks=("classification",),
            unlabeled=True,
            private=("gaussian",),
            exposes="it takes its training steps by itself",
        ),
    ),
    "Client end: knowledge distillation": (
        Entry(
            "fedmic",
            "distillation.fedmic:fedmic",
            "a private teacher and a shared student",
            "Ren et al. 2024",
            "the change of the student",
            stateful=True,
            uplink=("low-rank",),
            private=BOTH,
        ),
        Entry(
            "fedkd",
            "distillation.fedmic:fedkd",
            "a private mentor and a shared mentee",
            "Wu et al. 2022",
            "the change of the student",
            stateful=True,
            uplink=("low-rank",),
            private=BOTH,
        ),
        Entry(
            "mutual",
            "distillation.fedmic:mutual",
            "a private and a shared model learn from one another",
            "Shen et al. 2020; Zhang et al. 2018",
            "the change of the shared model",
            stateful=True,
            private=BOTH,
        ),
        Entry(
            "teacher-student",
            "distillation.teacher_student:teacher_student",
            "sites learn from labels and from a teacher",
            "Kumar et al. 2021; Hinton et al. 2015",
            private=BOTH,
        ),
        Entry(
            "fedmd",
            "distillation.fedmd:fedmd",
            "sites exchange what their models say of public images",
            "Li and Wang 2019",
            "scores on public images",
            tasks=("classification", "multilabel", "regression"),
            stateful=True,
            private=("gaussian",),
            exposes="its digest of public images trains on data that do not say whose they are",
        ),
        Entry(
            "feddf",
            "distillation.feddf:feddf",
            "the server distils all models on public images",
            "Lin et al. 2020",
            "the model, seen by the server for each site",
            private=("dp-sgd",),
        ),
        Entry(
            "fedad",
            "distillation.fedad:fedad",
            "one exchange of predictions and attention on public images",
            "Gong et al. 2021, 2022",
            "probabilities and attention on public images, once; class counts",
            tasks=("classification",),
            exposes="it sends scores of a model that was chosen on the data, and class counts",
        ),
    ),
    "Client end: data synthesis": (
        Entry(
            "fedvss",
            "synthesis.fedvss:FedVSS",
            "virtual examples made with the local and the global model",
            "Zhu and Luo 2022",
            private=("gaussian",),
            exposes="its loss cannot be taken example by example",
        ),
        Entry(
            "fedreplay",
            "synthesis.fedreplay:FedReplay",
            "the server trains on what the sites' generators replay",
            "Qu et al. 2022 (Medical Image Analysis)",
            "a generator of the site's examples and its class counts, kept apart by site",
            tasks=("classification",),
            stateful=True,
            exposes="it sends a generator that was trained without privacy, and class counts",
        ),
        Entry(
            "fedni",
            "synthesis.fedni:fedni",
            "population graphs, completed by imagined neighbors",
            "Peng et al. 2022",
            tasks=("classification", "multilabel", "regression"),
            unlabeled=True,
            exposes="it trains on examples of its own making, which do not say whose they are",
        ),
    ),
    "Client end: unequal machines": (
        Entry(
            "fednova",
            "heterogeneity.fednova:FedNova",
            "changes averaged per unit of work",
            "Wang et al. 2020",
            "the change of the model per step, and how many steps",
            private=BOTH,
        ),
        Entry(
            "semi-sync",
            "heterogeneity.semi_sync:semi_sync",
            "every site trains for the same time",
            "Stripelis et al. 2022",
            "the change of the model, and the seconds of an epoch",
            exposes="it sends how long an epoch took, without noise",
        ),
        Entry(
            "partial-work",
            "heterogeneity.partial_work:partial_work",
            "late sites do part of their work",
            "Li et al. 2020 (MLSys)",
            private=BOTH,
        ),
    ),
    "Server end: weight aggregation": (
        Entry(
            "loss-weighted",
            "aggregation.loss_weighting:LossWeighted",
            "sites count more, the lower their training loss",
            "Li et al., in Guan et al. 2024",
            exposes="the weight of an update shows the training loss",
        ),
        Entry(
            "ida",
            "aggregation.ida:ida",
            "sites count less, the farther they are from the mean",
            "Yeganeh et al. 2020",
            SEEN,
            private=("dp-sgd",),
        ),
        Entry(
            "prr-fl",
            "aggregation.prrfl:PRRFL",
            "low frequencies of the weights are shared; a deputy and a personal model teach one another",
            "Chen et al. 2021 (MICCAI)",
            "a deputy model without normalization layers, which the server sees site by site",
            tasks=("classification",),
            stateful=True,
            exposes="scores on all training patients choose the loss",
        ),
        Entry(
            "pfa",
            "aggregation.pfa:PFA",
            "low frequencies of the weights are shared",
            "Chen et al. 2021 (MICCAI)",
            "the model without normalization layers, which the server sees site by site",
            stateful=True,
            private=("dp-sgd",),
        ),
        Entry(
            "auto-fedavg",
            "aggregation.auto_fedavg:auto_fedavg",
            "the weights of the mean are learned",
            "Xia et al. 2021",
            "the change of the model, which the server sees site by site, and gradients",
            exposes="it sends gradients of the validation loss, exact",
        ),
        Entry(
            "fedmix-weights",
            "aggregation.adaptive_weights:AdaptiveWeights",
            "sites count by their examples and by their loss",
            "Wicaksana et al. 2023",
            "the change of the model, the number of examples and the training loss",
            stateful=True,
            exposes="it sends the training loss, exact",
        ),
        Entry(
            "fedce",
            "aggregation.fedce:fedce",
            "sites count by what they contribute",
            "Jiang et al. 2023 (CVPR)",
            "the change of the model, which the server sees site by site, and the training loss",
            exposes="it sends the training loss, exact",
        ),
        Entry(
            "fedgma",
            "aggregation.fedgma:FedGMA",
            "coordinates on which sites disagree move less",
            "Tenison et al. 2023",
            "the change of the model, and its signs",
            private=BOTH,
        ),
        Entry(
            "fedbuff",
            "aggregation.fedbuff:fedbuff",
            "nobody waits for the slowest site; old answers count less",
            "Nguyen et al. 2022",
            private=BOTH,
        ),
        Entry(
            "dynamic-fusion",
            "aggregation.dynamic_fusion:DynamicFusion",
            "a site sends its model only where training made it better",
            "Zhang et al. 2021",
            "whether training helped and, where it did, the change of the model",
            stateful=True,
            exposes="whether a site sends its model shows how well that does on its data",
        ),
    ),
    "Server end: domain shift and fairness": (
        Entry(
            "q-ffl",
            "fairness.qffl:q_ffl",
            "sites count more, the worse the model is at them",
            "Li et al. 2020 (ICLR)",
            exposes="the weight of an update shows the training loss",
        ),
        Entry(
            "afl",
            "fairness.afl:AFL",
            "the model that is best for the worst mixture of sites",
            "Mohri et al. 2019",
            "the change of the model, and the training loss",
            exposes="it sends the training loss, exact",
        ),
        Entry(
            "prop-ffl",
            "fairness.prop_ffl:PropFFL",
            "hospitals count more, the nearer their loss is to the worst",
            "Hosseini et al. 2023",
            "the change of the model, the training loss and the number of examples",
            exposes="it sends the training loss, exact",
        ),
        Entry(
            "guided-gradient",
            "fairness.guided_gradients:guided_gradient",
            "sites whose change points against the common direction do not count",
            "Fan et al., in Guan et al. 2024",
            SEEN,
            private=("dp-sgd",),
        ),
        Entry(
            "fedsld",
            "fairness.fedsld:FedSLD",
            "minibatches weighed to look like the whole federation",
            "Luo and Wu 2022",
            "the change of the model and, once, class counts",
            tasks=("classification",),
            private=("gaussian",),
            exposes="it sends class counts, exact",
        ),
    ),
    "Server end: corrupted clients": (
        Entry(
            "watched",
            "robust.named_rules:watched",
            "the plain mean, and every site's standing shown to people",
            "Iglewicz and Hoaglin 1993",
            SEEN,
            private=("dp-sgd",),
        ),
        Entry(
            "krum",
            "robust.named_rules:krum",
            "the one update closest to its neighbors",
            "Blanchard et al. 2017",
            SEEN,
            private=("dp-sgd",),
        ),
        Entry(
            "multi-krum",
            "robust.named_rules:multi_krum",
            "the mean of the updates closest to their neighbors",
            "Blanchard et al. 2017",
            SEEN,
            private=("dp-sgd",),
        ),
        Entry(
            "bulyan",
            "robust.named_rules:bulyan",
            "krum again and again, then a trimmed mean",
            "El Mhamdi et al. 2018",
            SEEN,
            private=("dp-sgd",),
        ),
        Entry(
            "median",
            "robust.named_rules:coordinate_median",
            "each coordinate's median",
            "Yin et al. 2018",
            SEEN,
            private=("dp-sgd",),
        ),
        Entry(
            "trimmed-mean",
            "robust.named_rules:trimmed_mean",
            "each coordinate's mean without its extremes",
            "Yin et al. 2018",
            SEEN,
            private=("dp-sgd",),
        ),
        Entry(
            "geometric-median",
            "robust.named_rules:geometric_median",
            "the point nearest to all updates together (RFA)",
            "Pillutla et al. 2022",
            SEEN,
            private=("dp-sgd",),
        ),
        Entry(
            "centered-clipping",
            "robust.named_rules:centered_clipping",
            "no site moves the last aggregate far",
            "Karimireddy et al. 2021",
            SEEN,
            private=("dp-sgd",),
        ),
        Entry(
            "fltrust",
            "robust.named_rules:fltrust",
            "updates weighed by a trusted one",
            "Cao et al. 2021",
            SEEN,
            private=("dp-sgd",),
        ),
        Entry(
            "dos",
            "robust.named_rules:dos",
            "updates weighed by how usual their distances are (DOS, COPOD)",
            "Alkhunaizi et al. 2022",
            SEEN,
            private=("dp-sgd",),
        ),
    ),
    "Topologies": (
        Entry(
            "swarm",
            "topology.swarm:Swarm",
            "no central server: one of the sites merges, another in each round",
            "Warnat-Herresthal et al. 2021",
            "the change of the model, which the elected site sees site by site",
            exposes="the elected site sends what it merged without noise of its own",
        ),
        Entry(
            "gossip",
            "topology.gossip:Gossip",
            "no server: sites average with their neighbors",
            "Lian et al. 2017",
            "the model, which neighbors see",
            stateful=True,
            private=("dp-sgd",),
        ),
        Entry(
            "cyclic",
            "topology.cyclic:cyclic",
            "the model travels from site to site",
            "Chang et al. 2018",
            "the change of the model, which the next site sees",
            private=BOTH,
        ),
        Entry(
            "split",
            "topology.split_learning:split",
            "the server holds the last layers; labels travel",
            "Gupta and Raskar 2018; Poirot et al. 2019",
            "activations and labels of every minibatch, and the first layers",
            tasks=("classification", "multilabel", "regression"),
            stateful=True,
            exposes="it takes its training steps by itself",
        ),
        Entry(
            "u-split",
            "topology.split_learning:u_split",
            "the server holds the middle layers; labels stay home",
            "Vepakomma et al. 2018",
            "activations and gradients of every minibatch, and the first and last layers",
            tasks=("classification", "multilabel", "regression"),
            stateful=True,
            exposes="it takes its training steps by itself",
        ),
    ),
    "Communication: one-shot merging": (
        Entry(
            "data-vectors",
            "one_shot.data_vectors:datavectors",
            "one message from each site, whenever it is ready",
            "Tian et al. 2024",
            "the change of the model and its statistics, once, which the server sees site by site",
            private=("dp-sgd",),
        ),
    ),
}

METHODS: Mapping[str, Entry] = {entry.name: entry for entries in FAMILIES.values() for entry in entries}
ALIASES: Mapping[str, str] = {"single": "local", "mix": "pooled", "taught": "teacher-student"}
"""Other names that a study may use: those of the survey, and a former one."""


def canonical(name: str) -> str:
    """Return the name in the table for ``name``, which may be an alias."""
    return ALIASES.get(name, name)


def family_of(name: str) -> str:
    """Return the family of the method called ``name``."""
    name = canonical(name)
    return next(family for family, entries in FAMILIES.items() if any(entry.name == name for entry in entries))
