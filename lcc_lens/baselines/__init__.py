"""What restorations are compared with: other people's methods, trained by the same code on the same batches."""

from lcc_lens.baselines.adapters import AdapterInjection, adapters
from lcc_lens.baselines.eora import eora
from lcc_lens.baselines.flap import BiasInjection, flap
from lcc_lens.baselines.lofit import LOFIT_LR, lofit_heads

__all__ = ["LOFIT_LR", "AdapterInjection", "BiasInjection", "adapters", "eora", "flap", "lofit_heads"]
