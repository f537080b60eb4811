"""What `scaling_law fit` prints. Knows no formula; torch-free."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mm_train.scaling_law.fit import Fitted

UNITS = {1e9: "billions", 1e6: "millions", 1e3: "thousands", 1.0: "ones"}
WORDS = {"active_params": "N", "tokens": "D"}
FORMULA = {
    "joint": "L = A Ê^delta N^(alpha + gamma ln Ê) + B Ê^omega D^(beta + zeta ln Ê) + c",
    "fixed": "L = A N^alpha + B D^beta + c",
}


def text(fits: "Sequence[Fitted]") -> str:
    """The whole report."""
    return "\n\n".join("\n".join(_one(fitted)) for fitted in fits)


def _one(fitted: "Fitted") -> Iterable[str]:
    law, facts, names = fitted.law, fitted.facts, fitted.form.names
    yield f"{fitted.label}: {FORMULA[fitted.form.name]}, N and D in {UNITS.get(law.unit, f'units of {law.unit:g}')}"
    yield (
        f"  {facts['runs']} runs, N {law.active_params[0]:.4g}..{law.active_params[1]:.4g}, D {law.tokens[0]:.4g}.."
        f"{law.tokens[1]:.4g}, E {', '.join(map(str, law.expansions))}; {facts['starts']} starts, of the"
        f" {facts['finalists_agreeing'][1]} best {facts['finalists_agreeing'][0]} agree"
    )
    for name in names:
        line = f"  {name:<6} {getattr(law.coefficients, name):>9.4f}"
        if name in facts["intervals"]:
            low, high = facts["intervals"][name]
            line += f"   95 %: {low:.4f} .. {high:.4f}"
        held = facts["c_held_near"]
        yield line + (f"   held near {held:g}" if name == "c" and held is not None else "")
    yield f"  RMSE {law.rmse:.4f} nats per token"
    if facts["intervals"]:
        half = facts["prediction_interval_half_width_max"]
        yield f"  95 % interval of a prediction within the runs: at most +- {half:.4f}"
        pairs = "; ".join(f"{a} and {b} {r:+.3f}" for a, b, r in facts["move_together"][:5])
        if pairs:
            yield f"  hardly told apart by these runs (correlation between draws): {pairs}"
        loadings = facts["principal_direction"]["loadings"]
        most = sorted(loadings, key=lambda name: -abs(loadings[name]))[:6]
        yield (
            f"  the draws scatter most along {', '.join(f'{loadings[name]:+.2f} {name}' for name in most)}"
            f" ({facts['principal_direction']['share']:.0%} of all; in standard deviations, A, B, c as logarithms)"
        )
    yield "  left out and predicted by the rest:"
    for out in facts["leave_one_out"]:
        scale = f"{WORDS[out['column']]} {out['value']:.4g} ({out['runs']} runs)"
        yield f"    {scale}: " + (f"RMSE {out['rmse']:.4f}" if out["rmse"] is not None else f"no, {out['why_not']}")
