"""The on-device scaling law: what loss a network of N active parameters and expansion E has after D tokens.

    L(N, D, E) = A Ê^δ N^(α + γ ln Ê) + B Ê^ω D^(β + ζ ln Ê) + c                                            (1)
    1 / Ê      = 1 / (E - 1 + 1 / (1 / E_start - 1 / E_max)) + 1 / E_max

The joint law of Ludziejewski et al. (arXiv 2502.05172) as MobileMoE (arXiv 2605.27358) uses it. N counts what takes
part in one token's forward pass, the tied embedding once (inventory.active_parameters): so the paper's S, M and L have
its 0.3, 0.5 and 0.9 B. E is the width of all experts over the width of those that a token meets. N and D go into the
formula divided by `unit`: the published coefficients are for billions, and mean nothing in other units. Torch-free.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mm_train.cli import UserError

Array = npt.NDArray[np.float64]
SCHEMA = "mobilemoe-train scaling law 1"  # first key of the files that `fit` writes


class Coefficients(NamedTuple):
    """Of equation (1), with the signs of the paper: alpha, beta are negative where more is better."""

    A: float
    delta: float
    alpha: float
    gamma: float
    B: float
    omega: float
    beta: float
    zeta: float
    c: float


class Reduced(NamedTuple):
    """A N^alpha + B D^beta + c: what is left of equation (1) when the expansion is fixed."""

    A: float
    alpha: float
    B: float
    beta: float
    c: float


@dataclass(frozen=True)
class Law:
    """Equation (1) with values, and where they come from: outside of these ranges it is a guess."""

    coefficients: Coefficients
    unit: float  # N and D are divided by it
    active_params: tuple[float, float]  # of the networks that it was fitted to
    tokens: tuple[float, float]
    expansions: tuple[int, ...]
    granularity: int  # of all of these networks
    shared: bool
    rmse: float  # of the fit, in nats per token
    source: str
    e_start: float = 1.0
    e_max: float = 32.0
    draws: tuple[Coefficients, ...] = ()  # of the bootstrap

    def loss(self, active: npt.ArrayLike, tokens: npt.ArrayLike, expansion: npt.ArrayLike) -> Array:
        """Predicted loss in nats per token; the arguments broadcast."""
        return self._loss(self.coefficients, active, tokens, expansion)

    def loss_draws(self, active: npt.ArrayLike, tokens: npt.ArrayLike, expansion: npt.ArrayLike) -> Array:
        """The same by every draw of the bootstrap, [draws, ...]; without a bootstrap there are none."""
        return np.array([self._loss(draw, active, tokens, expansion) for draw in self.draws])

    def reduced(self, expansion: float) -> Reduced:
        """The Chinchilla law of one expansion."""
        k = self.coefficients
        log = math.log(effective_expansion(expansion, self.e_start, self.e_max))
        return Reduced(
            A=k.A * math.exp(k.delta * log),
            alpha=k.alpha + k.gamma * log,
            B=k.B * math.exp(k.omega * log),
            beta=k.beta + k.zeta * log,
            c=k.c,
        )

    def _loss(self, k: Coefficients, active: npt.ArrayLike, tokens: npt.ArrayLike, expansion: npt.ArrayLike) -> Array:
        log_n = np.log(np.asarray(active, float) / self.unit)
        log_d = np.log(np.asarray(tokens, float) / self.unit)
        log_e = np.log(effective_expansion(expansion, self.e_start, self.e_max))
        of_size = k.A * np.exp(k.delta * log_e + (k.alpha + k.gamma * log_e) * log_n)
        of_data = k.B * np.exp(k.omega * log_e + (k.beta + k.zeta * log_e) * log_d)
        return of_size + of_data + k.c


def effective_expansion(expansion: npt.ArrayLike, e_start: float = 1.0, e_max: float = 32.0) -> Any:
    """Ê: E at first, and never more than E_max however many experts there are. Of E_start it is 1."""
    start = 1 / (1 / e_start - 1 / e_max)
    return 1 / (1 / (np.asarray(expansion, float) - 1 + start) + 1 / e_max)


PUBLISHED = Law(
    Coefficients(0.2388, 0.0906, -0.2833, 0.0387, 0.6019, 1.0593, -0.3210, -0.3684, 1.9730),
    unit=1e9,
    active_params=(0.3e9, 0.9e9),
    tokens=(100e9, 500e9),
    expansions=(1, 2, 4, 8, 16, 32),
    granularity=8,
    shared=True,
    rmse=0.0076,
    source="arXiv 2605.27358, joint fit of the E-sweep",
)


def load_law(name: str) -> Law:
    """The law called `published`, or the one in a file that `fit` wrote.

    Raises UserError for a file that is missing, is none of these, or holds several reduced fits.
    """
    if name == "published":
        return PUBLISHED
    path = Path(name)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the law {path}: {error}; give published, or a law.json of `fit`") from None
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:
        raise UserError(f"{path} is not a law of `scaling_law fit`: its schema is not {SCHEMA!r}")
    if values.get("form") != "joint":
        raise UserError(f"{path} holds fits of form {values.get('form')!r}; this needs the joint one: fit --form joint")
    try:
        return _from_json(values["fits"][0])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{path}: a value of the law is missing or wrong: {error!r}") from None


def law_to_json(law: Law) -> dict[str, Any]:
    """Plain values, which `load_law` reads back equal."""
    values = asdict(law)
    values["coefficients"] = law.coefficients._asdict()
    values["draws"] = [list(draw) for draw in law.draws]
    return values


def _from_json(values: dict[str, Any]) -> Law:
    numbers = Coefficients(**{key: float(value) for key, value in values["coefficients"].items()})
    law = Law(
        numbers,
        unit=float(values["unit"]),
        active_params=_pair(values["active_params"]),
        tokens=_pair(values["tokens"]),
        expansions=tuple(int(e) for e in values["expansions"]),
        granularity=int(values["granularity"]),
        shared=bool(values["shared"]),
        rmse=float(values["rmse"]),
        source=str(values["source"]),
        e_start=float(values["e_start"]),
        e_max=float(values["e_max"]),
        draws=tuple(Coefficients(*map(float, draw)) for draw in values["draws"]),
    )
    positive = (law.unit, *law.active_params, *law.tokens, *law.expansions, law.granularity, law.rmse, law.e_start)
    if not all(map(math.isfinite, (*numbers, *positive))) or min(positive) <= 0 or not law.expansions:
        raise ValueError("a number is not finite or not positive")
    return law


def _pair(values: Sequence[Any]) -> tuple[float, float]:
    low, high = map(float, values)
    return low, high
