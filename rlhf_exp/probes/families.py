"""The probe families by name, with their defaults."""

from rlhf_exp.probes.ccs import CCS
from rlhf_exp.probes.gaussian import LDA, MeanDifference
from rlhf_exp.probes.head import Family
from rlhf_exp.probes.logistic import INLP, Logistic, LogisticDifference
from rlhf_exp.probes.unsupervised import BSS, TPC, Random
from rlhf_exp.probes.vinc import VINC

FAMILIES: dict[str, type[Family]] = {
    "logistic": Logistic,
    "logistic_difference": LogisticDifference,
    "mean_difference": MeanDifference,
    "lda": LDA,
    "inlp": INLP,
    "ccs": CCS,
    "tpc": TPC,
    "bss": BSS,
    "vinc": VINC,
    "random": Random,
}
