"""The table of methods that a study may use. Plain data, so that listing it imports no numerical library.

A new method is one file and one entry here. The fields of its class, other than those that the study provides, are the
keys that a study file may set, with their defaults.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Needs = Literal["classification", "multilabel", "segmentation", "regression", "reconstruction"]
Way = Literal["dp-sgd", "gaussian"]


@dataclass(frozen=True)
class Entry:
    """One method.

    Attributes:
        name: Its name in a study file.
        make: ``module:class`` under ``polyclinic.methods``; a function in place of the class if several objects are
            composed.
        summary: Its description in one line.
        paper: The publications to cite.
        leaves: What leaves a site; "nothing" if nothing does.
        baseline: Whether it is a baseline rather than federated learning.
        pooled: Whether its data are in one place.
        tasks: The kinds of task that it supports; any if empty.
        stateful: Whether sites keep state between rounds.
        unlabeled: Whether a site without any labels takes part. Otherwise such a site is only evaluated.
        newcomers: Whether there is a model for a site that never trained.
        uplink: The default transforms of its replies, which are part of the method's paper.
        private: The ways in which everything that leaves is covered by an ε: "dp-sgd" if sites train with it,
            "gaussian" if replies pass a clip and noise (or the sparse vector technique).
            ``tests/attacks/test_release_audit.py`` verifies this for every method by the release audit.
        exposes: What DP-SGD does not cover, or why it cannot be used; empty if it covers everything.
        fixed: Arguments that distinguish this name from others of the same class. They are not options.
        defaults: Defaults of options that differ from those of the class.
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
    fixed: Mapping[str, object] = field(default_factory=dict)
    defaults: Mapping[str, object] = field(default_factory=dict)


BOTH: tuple[Way, ...] = ("dp-sgd", "gaussian")
OWN_STEPS = "it takes individual training steps"
NOT_BY_EXAMPLE = "its loss cannot be computed example by example"
OWN_EXAMPLES = "it trains on examples that it generates, which are not assigned to patients"
EXACT_LOSS = "it sends the exact training loss"
WEIGHT_IS_LOSS = "the weight of an update discloses the training loss"
SEEN = "the change of the model, which the server sees site by site"

# By the survey's taxonomy (Guan, Yap, Bozoki and Liu, "Federated learning for medical image analysis", 2024).
FAMILIES: Mapping[str, tuple[Entry, ...]] = {
    "Baselines": (
        Entry(
            "local",
            "optimization.baselines:LocalOnly",
            "local training at each site",
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
            "each site is tested with another site's model",
            "Guan et al. 2024",
            "the model",
            baseline=True,
            stateful=True,
            newcomers=False,
            private=("dp-sgd",),
        ),
        Entry(
            "pooled",
            "optimization.fedavg:FedAvg",
            "training on all data in one place",
            "Guan et al. 2024",
            "the data",
            baseline=True,
            pooled=True,
            private=("dp-sgd",),
            fixed={"lr": 1.0, "uniform": False},
        ),
    ),
    "Federated optimization": (
        Entry("fedavg", "optimization.fedavg:FedAvg", "federated averaging", "McMahan et al. 2017", private=BOTH),
        Entry(
            "fedsgd",
            "optimization.fedsgd:FedSGD",
            "one full-batch gradient per round",
            "McMahan et al. 2017",
            "a gradient",
            private=("gaussian",),
            exposes="it sends the exact gradient of all training patients",
        ),
        Entry(
            "fedprox",
            "optimization.fedprox:FedProx",
            "a proximal term limits client drift",
            "Li et al. 2020 (MLSys)",
            private=BOTH,
        ),
        Entry(
            "scaffold",
            "optimization.scaffold:Scaffold",
            "control variates against client drift",
            "Karimireddy et al. 2020",
            "the change of the model and of a control variate",
            stateful=True,
            private=BOTH,
        ),
        Entry(
            "fedavgm",
            "optimization.fedopt:FedOpt",
            "momentum at the server",
            "Hsu et al. 2019",
            private=BOTH,
            fixed={"rule": "momentum", "beta2": 0.99, "tau": 1e-3},
            defaults={"lr": 1.0},
        ),
        Entry(
            "fedadagrad",
            "optimization.fedopt:FedOpt",
            "Adagrad at the server",
            "Reddi et al. 2021",
            private=BOTH,
            fixed={"rule": "adagrad", "beta1": 0.0, "beta2": 0.99},
        ),
        Entry(
            "fedadam",
            "optimization.fedopt:FedOpt",
            "Adam at the server",
            "Reddi et al. 2021",
            private=BOTH,
            fixed={"rule": "adam"},
        ),
        Entry(
            "fedyogi",
            "optimization.fedopt:FedOpt",
            "Yogi at the server",
            "Reddi et al. 2021",
            private=BOTH,
            fixed={"rule": "yogi"},
        ),
        Entry(
            "feddyn",
            "optimization.feddyn:FedDyn",
            "a dynamic regularizer aligns the sites' objectives",
            "Acar et al. 2021",
            stateful=True,
            private=BOTH,
        ),
        Entry(
            "mime",
            "optimization.mime:Mime",
            "local steps with the server's momentum, corrected for client drift",
            "Karimireddy et al. 2021 (NeurIPS)",
            "a gradient, and the change of the model",
            private=("gaussian",),
            exposes="it sends the exact gradient of all training patients",
            fixed={"lite": False},
        ),
        Entry(
            "mime-lite",
            "optimization.mime:Mime",
            "local steps with the server's momentum",
            "Karimireddy et al. 2021 (NeurIPS)",
            "the change of the model, and a gradient",
            private=("gaussian",),
            exposes="in addition to the update it sends the exact gradient of all training patients",
            fixed={"lite": True},
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
            "a personal model regularized towards the global one",
            "Li et al. 2021 (ICML)",
            stateful=True,
            private=BOTH,
        ),
        Entry(
            "pfedme",
            "personalization.pfedme:PFedMe",
            "personal models regularized towards a shared one",
            "T. Dinh et al. 2020 (NeurIPS)",
            stateful=True,
            private=("gaussian",),
            exposes=OWN_STEPS,
        ),
        Entry(
            "apfl",
            "personalization.apfl:APFL",
            "each site predicts with a learned mixture of its own model and the shared one",
            "Deng et al. 2020",
            stateful=True,
            private=("gaussian",),
            exposes=OWN_STEPS,
        ),
        Entry(
            "fedrep",
            "personalization.fedrep:fedrep",
            "heads stay at the sites and are trained before the representation",
            "Collins et al. 2021",
            "the change of all but the head",
            stateful=True,
            private=BOTH,
        ),
        Entry(
            "moon",
            "personalization.moon:Moon",
            "representations are drawn to the global model's by a contrast",
            "Li et al. 2021 (CVPR)",
            stateful=True,
            private=BOTH,
        ),
        Entry(
            "ifca",
            "personalization.ifca:IFCA",
            "several models; each site trains the one with the lowest loss",
            "Ghosh et al. 2020",
            "the change of every cluster's model, 0 for those that the site is not in",
            stateful=True,
            private=("gaussian",),
            exposes="which cluster a site chose shows its training loss",
        ),
        Entry(
            "feddg",
            "personalization.feddg:FedDG",
            "sites train in the styles of the others, for unseen hospitals",
            "Liu et al. 2021 (CVPR)",
            "low-frequency amplitude spectra of some images, once, separate by site and shown to the other sites; then the change of the model",
            exposes="it sends amplitude spectra of single images",
        ),
        Entry(
            "fedsm",
            "personalization.fedsm:FedSM",
            "a global model, personal ones, and a selector between them",
            "Xu et al. 2022 (CVPR)",
            "the change of the global model and of the selector; the personal model, separate by site",
            exposes="it sends a selector that was trained without privacy",
        ),
        Entry(
            "iop-fl",
            "personalization.iopfl:IOPFL",
            "personal models for training sites; for others, a mixture of them adapted at test time",
            "Jiang et al. 2023 (TMI)",
            "the change of the model; the personal model, separate by site",
            tasks=("classification", "segmentation"),
            stateful=True,
            private=("dp-sgd",),
        ),
        Entry(
            "fednorm",
            "personalization.fednorm:FedNorm",
            "one model for several modalities, with normalization layers for each",
            "Bernecker et al. 2022",
            "the change of the model, and the site's modality",
            private=BOTH,
        ),
        Entry(
            "fedmri",
            "personalization.fedmri:fedmri",
            "a shared encoder, a private decoder, and a contrast of encoders",
            "Feng et al. 2022 (TMI)",
            "the change of the encoder; with `others`, the encoder, separate by site",
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
            "site-specific channel selection, and heads calibrated where sites disagree",
            "Wang et al. 2022 (ECCV)",
            "the change of all but the head; the head, separate by site and shown to the other sites",
            tasks=("segmentation",),
            stateful=True,
            exposes=NOT_BY_EXAMPLE,
        ),
    ),
    "Client end: domain adaptation": (
        Entry(
            "fed-align",
            "domain_adaptation.fedalign:FedAlign",
            "features whose site discriminators cannot identify",
            "Li et al. 2020 (Medical Image Analysis)",
            "the change of the model; noisy features of some examples, and a discriminator, each separate by site",
            stateful=True,
            exposes=OWN_STEPS,
        ),
        Entry(
            "fed-moe",
            "domain_adaptation.fedmoe:FedMoE",
            "a federated and a private model, mixed by a private gate",
            "Li et al. 2020 (Medical Image Analysis)",
            "the change of the federated expert",
            stateful=True,
            private=BOTH,
        ),
        Entry(
            "fedharmony",
            "domain_adaptation.fedharmony:FedHarmony",
            "features from which the scanner cannot be identified",
            "Dinsdale et al. 2022",
            "the change of the model and of a domain classifier; mean and deviation of features, separate by site",
            exposes=OWN_STEPS,
        ),
        Entry(
            "fl-mrcm",
            "domain_adaptation.mrcm:MRCM",
            "sites with references, aligned to one without",
            "Guo et al. 2021 (CVPR)",
            "the change of the model; from the target, latent features of some examples, separate by site",
            stateful=True,
            exposes="it takes individual training steps, and sends latent features of single examples",
        ),
    ),
    "Client end: image harmonization": (
        Entry(
            "harmofl",
            "harmonization.harmofl:HarmoFL",
            "one amplitude spectrum for all images, and flat minima",
            "Jiang et al. 2022 (AAAI)",
            "the mean amplitude spectrum of the site's images, once, then the change of the model",
            private=("gaussian",),
            exposes=OWN_STEPS,
        ),
        Entry(
            "zscore",
            "harmonization.zscore:zscore",
            "inputs with mean 0 and standard deviation 1, over all sites or within each",
            "textbook",
            "sums and sums of squares of the data, once, then the change of the model",
            stateful=True,
            exposes="it sends exact sums of the data",
        ),
        Entry(
            "combat",
            "harmonization.combat:combat",
            "removes each scanner's offset and scale from every feature",
            "Johnson et al. 2007; Chen et al. 2022 (NeuroImage)",
            "the site's sums of features and of squared residuals, once, then the change of the model",
            stateful=True,
            private=("gaussian",),
            exposes="it sends exact sums of features, and they enter every gradient",
        ),
        Entry(
            "vafl",
            "harmonization.vafl:vafl",
            "translates images to the style of the site with the lowest variation",
            "Yan et al. 2021 (JBHI)",
            "the variation of the site's images and, from one site, generated images, separate by site; then the change of the model",
            stateful=True,
            exposes="it sends the exact variation of the images, and generated images",
        ),
        Entry(
            "stain-norm",
            "harmonization.stain_norm:stain_norm",
            "one generator translates all sites' images to a common style",
            "Ke et al. 2021 (ISBI)",
            "the change of a generator of images, then that of the model",
            stateful=True,
            exposes="it sends a generator that was trained without privacy",
        ),
        Entry(
            "histogram-match",
            "harmonization.histogram_match:histogram_match",
            "maps each site's gray values to the quantiles of all sites",
            "Nyúl and Udupa 1999",
            "counts, moments and histograms of the data, once, as sums; then the change of the model",
            stateful=True,
            exposes="it sends exact histograms of the data",
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
            exposes=OWN_EXAMPLES,
        ),
        Entry(
            "fedmae",
            "self_supervised.fedmae:fedmae",
            "masked image modeling, then training on labels",
            "Yan et al. 2023",
            unlabeled=True,
            private=("gaussian",),
            exposes=OWN_EXAMPLES,
        ),
        Entry(
            "fcl",
            "self_supervised.fcl:fcl",
            "contrast between parts of the body, with other sites' features",
            "Wu et al. 2021 (MICCAI)",
            "the change of the model; features of single images",
            stateful=True,
            unlabeled=True,
            exposes=OWN_EXAMPLES,
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
            "semi_supervised.fedirm:FedIRM",
            "sites without labels match the class relations of labeled sites",
            "Liu et al. 2021 (MICCAI)",
            "the change of the model, and its class relations",
            tasks=("classification",),
            stateful=True,
            unlabeled=True,
            private=("gaussian",),
            exposes=NOT_BY_EXAMPLE,
        ),
        Entry(
            "fedsemi",
            "semi_supervised.fedsemi:FedSemi",
            "sites without labels learn from confident predictions",
            "Yang et al. 2021 (MedIA)",
            tasks=("segmentation", "classification"),
            unlabeled=True,
            private=("gaussian",),
            exposes=OWN_STEPS,
        ),
        Entry(
            "fedperl",
            "semi_supervised.fedperl:FedPerl",
            "similar peers help to label, anonymously",
            "Bdair et al. 2021",
            "the model, which only the server sees; others receive averages",
            tasks=("classification", "segmentation"),
            unlabeled=True,
            exposes=NOT_BY_EXAMPLE,
        ),
        Entry(
            "fedmix",
            "semi_supervised.fedmix:FedMix",
            "masks, boxes, image labels or no annotation, by two networks that agree",
            "Wicaksana et al. 2023",
            "the change of two models, the number of images used, and their loss",
            tasks=("segmentation",),
            stateful=True,
            unlabeled=True,
            exposes=NOT_BY_EXAMPLE,
        ),
        Entry(
            "histofl",
            "semi_supervised.histofl:HistoFL",
            "slides as bags of patches, weights sent with uncalibrated noise",
            "Lu et al. 2022 (MedIA)",
            "the change of the model, with noise",
            private=BOTH,
        ),
        Entry(
            "fedcy",
            "semi_supervised.fedcy:FedCy",
            "unlabeled videos are learned from their temporal order",
            "Kassem et al. 2023",
            tasks=("classification",),
            unlabeled=True,
            private=("gaussian",),
            exposes=OWN_STEPS,
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
            "distillation.fedmic:fedmic",
            "a private mentor and a shared mentee",
            "Wu et al. 2022",
            "the change of the student",
            stateful=True,
            uplink=("low-rank",),
            private=BOTH,
            fixed={"representation": 1.0, "decision": 1.0, "temperature": 1.0, "adaptive": True},
        ),
        Entry(
            "mutual",
            "distillation.fedmic:mutual",
            "a private and a shared model learn from each other",
            "Shen et al. 2020; Zhang et al. 2018",
            "the change of the shared model",
            stateful=True,
            private=BOTH,
        ),
        Entry(
            "teacher-student",
            "distillation.teacher_student:TeacherStudent",
            "sites learn from labels and from a teacher",
            "Kumar et al. 2021; Hinton et al. 2015",
            private=BOTH,
        ),
        Entry(
            "fedmd",
            "distillation.fedmd:FedMD",
            "sites exchange predictions on public images",
            "Li and Wang 2019",
            "scores on public images",
            tasks=("classification", "multilabel", "regression"),
            stateful=True,
            private=("gaussian",),
            exposes="it trains on public images, which are not assigned to patients",
        ),
        Entry(
            "feddf",
            "distillation.feddf:FedDF",
            "the server distills all models on public images",
            "Lin et al. 2020",
            "the model, which the server sees site by site",
            private=("dp-sgd",),
        ),
        Entry(
            "fedad",
            "distillation.fedad:FedAD",
            "one exchange of predictions and attention on public images",
            "Gong et al. 2021, 2022",
            "probabilities and attention on public images, once; class counts",
            tasks=("classification",),
            exposes="it sends scores of a model that was selected on the data, and class counts",
        ),
    ),
    "Client end: data synthesis": (
        Entry(
            "fedvss",
            "synthesis.fedvss:FedVSS",
            "virtual examples made with the local and the global model",
            "Zhu and Luo 2022",
            private=("gaussian",),
            exposes=NOT_BY_EXAMPLE,
        ),
        Entry(
            "fedreplay",
            "synthesis.fedreplay:FedReplay",
            "the server trains on examples from the sites' generators",
            "Qu et al. 2022 (Medical Image Analysis)",
            "a generator of the site's examples and its class counts, separate by site",
            tasks=("classification",),
            stateful=True,
            exposes="it sends a generator that was trained without privacy, and class counts",
        ),
        Entry(
            "fedni",
            "synthesis.fedni:FedNI",
            "population graphs, completed by generated neighbors",
            "Peng et al. 2022",
            tasks=("classification", "multilabel", "regression"),
            unlabeled=True,
            exposes=OWN_EXAMPLES,
        ),
    ),
    "Client end: unequal machines": (
        Entry(
            "fednova",
            "heterogeneity.fednova:FedNova",
            "changes averaged per unit of work",
            "Wang et al. 2020",
            "the change of the model per step, and the number of steps",
            private=BOTH,
        ),
        Entry(
            "semi-sync",
            "heterogeneity.semi_sync:semi_sync",
            "every site trains for the same time",
            "Stripelis et al. 2022",
            "the change of the model, and the seconds of an epoch",
            exposes="it sends the duration of an epoch, without noise",
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
            "site weights decrease with the training loss",
            "Li et al., in Guan et al. 2024",
            exposes=WEIGHT_IS_LOSS,
        ),
        Entry(
            "ida",
            "aggregation.ida:ida",
            "site weights decrease with the distance from the mean",
            "Yeganeh et al. 2020",
            SEEN,
            private=("dp-sgd",),
        ),
        Entry(
            "prr-fl",
            "aggregation.prrfl:PRRFL",
            "low frequencies of the weights are shared; a deputy and a personal model teach each other",
            "Chen et al. 2021 (MICCAI)",
            "a deputy model without normalization layers, which the server sees site by site",
            tasks=("classification",),
            stateful=True,
            exposes="scores on all training patients select the loss",
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
            "aggregation.auto_fedavg:AutoFedAvg",
            "the weights of the mean are learned",
            "Xia et al. 2021",
            "the change of the model, which the server sees site by site, and gradients",
            exposes="it sends exact gradients of the validation loss",
        ),
        Entry(
            "fedmix-weights",
            "aggregation.adaptive_weights:AdaptiveWeights",
            "site weights depend on the number of examples and the loss",
            "Wicaksana et al. 2023",
            "the change of the model, the number of examples and the training loss",
            stateful=True,
            exposes=EXACT_LOSS,
        ),
        Entry(
            "fedce",
            "aggregation.fedce:FedCE",
            "site weights are estimated contributions",
            "Jiang et al. 2023 (CVPR)",
            "the change of the model, which the server sees site by site, and the training loss",
            exposes=EXACT_LOSS,
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
            "aggregation.fedbuff:FedBuff",
            "asynchronous updates; old replies have less weight",
            "Nguyen et al. 2022",
            private=BOTH,
        ),
        Entry(
            "dynamic-fusion",
            "aggregation.dynamic_fusion:DynamicFusion",
            "a site sends its model only if training improved it",
            "Zhang et al. 2021",
            "whether training improved the model and, if so, the change of the model",
            stateful=True,
            exposes="whether a site sends its model depends on its validation loss",
        ),
    ),
    "Server end: domain shift and fairness": (
        Entry(
            "q-ffl",
            "fairness.qffl:QFFL",
            "site weights increase with the loss",
            "Li et al. 2020 (ICLR)",
            exposes=WEIGHT_IS_LOSS,
            fixed={"uniform": True},
        ),
        Entry(
            "afl",
            "fairness.afl:AFL",
            "minimizes the loss of the worst mixture of sites",
            "Mohri et al. 2019",
            "the change of the model, and the training loss",
            exposes=EXACT_LOSS,
        ),
        Entry(
            "prop-ffl",
            "fairness.prop_ffl:PropFFL",
            "hospital weights increase as the loss approaches the highest",
            "Hosseini et al. 2023",
            "the change of the model, the training loss and the number of examples",
            exposes=EXACT_LOSS,
        ),
        Entry(
            "guided-gradient",
            "fairness.guided_gradients:guided_gradient",
            "updates that oppose the mean direction have no weight",
            "Fan et al., in Guan et al. 2024",
            SEEN,
            private=("dp-sgd",),
        ),
        Entry(
            "fedsld",
            "fairness.fedsld:FedSLD",
            "minibatches weighted to the federation's class distribution",
            "Luo and Wu 2022",
            "the change of the model and, once, class counts",
            tasks=("classification",),
            private=("gaussian",),
            exposes="it sends exact class counts",
        ),
    ),
    "Server end: corrupted clients": (
        Entry(
            "watched",
            "robust.named_rules:watched",
            "the plain mean, with outlier statistics for every site",
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
            "repeated Krum, then a trimmed mean",
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
            "the point with the smallest sum of distances to all updates (RFA)",
            "Pillutla et al. 2022",
            SEEN,
            private=("dp-sgd",),
        ),
        Entry(
            "centered-clipping",
            "robust.named_rules:centered_clipping",
            "each site's change of the last aggregate is clipped",
            "Karimireddy et al. 2021",
            SEEN,
            private=("dp-sgd",),
        ),
        Entry(
            "fltrust",
            "robust.named_rules:fltrust",
            "updates weighted by their agreement with a trusted one",
            "Cao et al. 2021",
            SEEN,
            private=("dp-sgd",),
            defaults={"root": ""},
        ),
        Entry(
            "dos",
            "robust.named_rules:dos",
            "updates weighted by outlier scores of their distances (DOS, COPOD)",
            "Alkhunaizi et al. 2022",
            SEEN,
            private=("dp-sgd",),
        ),
    ),
    "Topologies": (
        Entry(
            "swarm",
            "topology.swarm:Swarm",
            "no central server: an elected site merges, another in each round",
            "Warnat-Herresthal et al. 2021",
            "the change of the model, which the elected site sees site by site",
            exposes="the elected site sends the merged model without noise of its own",
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
            "topology.cyclic:Cyclic",
            "sites train the model in turn",
            "Chang et al. 2018",
            "the change of the model, which the next site sees",
            private=BOTH,
        ),
        Entry(
            "split",
            "topology.split_learning:Split",
            "the server holds the last layers; labels are sent",
            "Gupta and Raskar 2018; Poirot et al. 2019",
            "activations and labels of every minibatch, and the first layers",
            tasks=("classification", "multilabel", "regression"),
            stateful=True,
            exposes=OWN_STEPS,
            fixed={"u_shaped": False},
        ),
        Entry(
            "u-split",
            "topology.split_learning:Split",
            "the server holds the middle layers; labels stay at the sites",
            "Vepakomma et al. 2018",
            "activations and gradients of every minibatch, and the first and last layers",
            tasks=("classification", "multilabel", "regression"),
            stateful=True,
            exposes=OWN_STEPS,
            fixed={"u_shaped": True},
        ),
    ),
    "Communication: one-shot merging": (
        Entry(
            "data-vectors",
            "one_shot.data_vectors:DataVectors",
            "one message from each site, at any time",
            "Tian et al. 2024",
            "the change of the model and its statistics, once, which the server sees site by site",
            private=("dp-sgd",),
        ),
    ),
}

METHODS: Mapping[str, Entry] = {entry.name: entry for entries in FAMILIES.values() for entry in entries}
ALIASES: Mapping[str, str] = {"single": "local", "mix": "pooled", "taught": "teacher-student"}
"""Other names that a study may use, such as those of the survey."""


def canonical(name: str) -> str:
    """Return the name in the table for ``name``, which may be an alias."""
    return ALIASES.get(name, name)


def family_of(name: str) -> str:
    """Return the family of the method called ``name``."""
    name = canonical(name)
    return next(family for family, entries in FAMILIES.items() if any(entry.name == name for entry in entries))
