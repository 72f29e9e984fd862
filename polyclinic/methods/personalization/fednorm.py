"""FedNorm: one model for several modalities, with separate normalization layers.

Bernecker, Peters, Schlett, Bamberg, Theis, Rueckert, Weiß and Albarqouni, "FedNorm: Modality-Based Normalization in
Federated Learning for Multi-Modal Liver Segmentation", 2022. https://arxiv.org/abs/2205.11096.

A site has one modality, as in FedNorm; FedNorm+, in which a site may have several, would need the modality of each
image. A site of unknown modality predicts with the mean of all modalities' layers.
"""

from dataclasses import dataclass

from polyclinic.learning.tasks.task import InNormalization
from polyclinic.methods.base.grouped_layers import GroupedLayers


@dataclass(frozen=True)
class FedNorm(GroupedLayers):
    """FedAvg whose normalization layers, weights and statistics alike, are averaged within each modality only.

    With one modality this is FedAvg; with one per site, FedBN.

    Attributes:
        modalities: The modality of each site, in the order of ``sites``; one for all if empty.
    """

    modalities: tuple[str, ...] = ()

    @property
    def groups(self) -> tuple[str, tuple[str, ...]]:
        return "modalities", self.modalities

    def grouped(self, name: str) -> bool:
        return InNormalization(self.task)(name)
