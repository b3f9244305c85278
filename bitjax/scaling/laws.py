"""Scaling laws: held-out loss of a model of N parameters after D tokens, for several arms at once.

    L = E + A / N_eff^alpha + B / D^beta           Hoffmann et al., arXiv 2203.15556, approach 3

An arm is a number format (float, ternary, ...). The first is the reference; what the others may
change is the form:

    shared      nothing
    eta         N_eff = eta N
    drift       N_eff = eta N (N / N0)^p (D / D0)^q      N0, D0: geometric means of the runs
    own-e       E
    eta-e       N_eff = eta N, and E
    separate    E, A, B, alpha and beta
    precision   N_eff = N (1 - exp(-P_w / gamma_w)) (1 - exp(-P_a / gamma_a)), no parameter of any
                arm but its bits P of weights and activations (Kumar et al., arXiv 2411.04330);
                gamma_w is fitted, gamma_a is theirs, and an unquantised cache has no factor

In fitted coordinates theta the logarithms of the three terms are linear, all but those of
`precision`: with n = log N, d = log D, and offsets h, p, q of an arm that are 0 for the reference,

    log L = logsumexp(a - alpha n + h + p (n - n0) + q (d - d0),  b - beta d,  e)

so eta = exp(-h / alpha); the derivatives are closed forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np

Form = Literal["shared", "eta", "drift", "own-e", "eta-e", "separate", "precision"]
FORMS: tuple[Form, ...] = get_args(Form)

BASE = ("a", "b", "e", "alpha", "beta")
OFFSETS: dict[Form, tuple[str, ...]] = {  # of each arm but the reference
    "shared": (), "precision": (), "eta": ("h",), "drift": ("h", "p", "q"), "own-e": ("e",),
    "eta-e": ("h", "e"), "separate": BASE,
}  # fmt: skip

# Kumar et al., appendix: fitted on 30M to 220M parameters, 3 to 12 bits.
GAMMA_W, GAMMA_A = 2.6745, 2.2102
MAX_LOG = 30.0  # of gamma_w, to each side: a line search may try any
# Bits of weights and activations. Float is not quantised, so has no factor.
BITS: dict[str, tuple[float, float]] = {
    "float": (np.inf, np.inf), "ternary": (float(np.log2(3)), 8), "binary": (1, 8),
    "int8": (8, 8), "int4": (4, np.inf),
    "ternary_float_activations": (float(np.log2(3)), np.inf),
}  # fmt: skip


@dataclass(frozen=True)
class Law:
    """A form over arms.

    Attributes:
        form: of the table above.
        arms: names; the first is the reference.
        center: (n0, d0), natural logarithms, where drift leaves eta as it is.
    """

    form: Form
    arms: tuple[str, ...]
    center: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"no law {self.form!r}; there are {', '.join(FORMS)}")
        if not self.arms or len(set(self.arms)) != len(self.arms):
            raise ValueError(f"arms {', '.join(self.arms) or 'none'}: want one or more, each once")
        if self.form == "precision" and (unknown := [a for a in self.arms if a not in BITS]):
            raise ValueError(
                f"the precision law needs bits, and arm {unknown[0]!r} has none; known are "
                f"{', '.join(BITS)}"
            )

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of the coordinates of theta, in order."""
        offsets = (f"{name}[{arm}]" for arm in self.arms[1:] for name in OFFSETS[self.form])
        return (*BASE, *offsets, *(("log gamma_w",) if self.form == "precision" else ()))

    def index(self, arms: Sequence[str] | np.ndarray) -> np.ndarray:
        """Positions of arms [n] in `self.arms`.

        Raises:
            ValueError: an arm that the law does not have.
        """
        if unknown := sorted({str(a) for a in arms} - set(self.arms)):
            raise ValueError(f"the fit has no arm {unknown[0]!r}; it has {', '.join(self.arms)}")
        return np.array([self.arms.index(str(a)) for a in arms], int)

    def design(self, N: np.ndarray, D: np.ndarray, arm: np.ndarray) -> np.ndarray:
        """Matrices [3, n, P] whose products with theta are the logarithms of the three terms.

        Those of `precision` lack the factor of N; `exponents` has it.

        Args:
            N: [n] parameters. D: [n] tokens. arm: [n] positions in `arms`.
        """
        n, d = np.log(N), np.log(D)
        X = np.zeros((3, len(n), len(self.names)))
        columns: dict[str, tuple[int, np.ndarray]] = {  # name: its term, and what multiplies it
            "a": (0, np.ones_like(n)), "alpha": (0, -n), "b": (1, np.ones_like(n)),
            "beta": (1, -d), "e": (2, np.ones_like(n)), "h": (0, np.ones_like(n)),
            "p": (0, n - self.center[0]), "q": (0, d - self.center[1]),
        }  # fmt: skip
        for k, name in enumerate(self.names):
            if name == "log gamma_w":
                continue
            base, _, of = name.partition("[")
            term, values = columns[base]
            X[term, :, k] = values if not of else values * (arm == self.arms.index(of[:-1]))
        return X

    def exponents(self, theta: np.ndarray, X: np.ndarray, arm: np.ndarray) -> np.ndarray:
        """Logarithms of the three terms, [R, 3, n], for theta [R, P] and a design."""
        _, n, P = X.shape
        U = (theta @ X.reshape(3 * n, P).T).reshape(-1, 3, n)
        if self.form == "precision":
            U[:, 0] -= theta[:, 3:4] * self._log_factor(theta)[0][:, arm]
        return U

    def gradient(
        self, theta: np.ndarray, X: np.ndarray, arm: np.ndarray, weight: np.ndarray
    ) -> np.ndarray:
        """Sum over runs and terms of weight [R, 3, n] times the exponents' derivatives: [R, P]."""
        _, n, P = X.shape
        g = weight.reshape(-1, 3 * n) @ X.reshape(3 * n, P)
        if self.form == "precision":
            value, slope = self._log_factor(theta)
            g[:, 3] -= (weight[:, 0] * value[:, arm]).sum(1)
            g[:, -1] -= theta[:, 3] * (weight[:, 0] * slope[:, arm]).sum(1)
        return g

    def jacobian(
        self, theta: np.ndarray, X: np.ndarray, arm: np.ndarray, share: np.ndarray
    ) -> np.ndarray:
        """Derivatives of log L, [R, n, P], from the terms' shares of L, [R, 3, n]."""
        J = np.einsum("rtn,tnp->rnp", share, X)
        if self.form == "precision":
            value, slope = self._log_factor(theta)
            J[:, :, 3] -= share[:, 0] * value[:, arm]
            J[:, :, -1] -= theta[:, 3:4] * share[:, 0] * slope[:, arm]
        return J

    def _log_factor(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """log(N_eff / N) of each arm [R, arms], and its derivative by log gamma_w."""
        bits = np.array([BITS[arm] for arm in self.arms])
        x = bits[:, 0] * np.exp(-np.clip(theta[:, -1:], -MAX_LOG, MAX_LOG))  # P_w / gamma_w
        finite = np.where(np.isfinite(x), x, 1.0)
        slope = np.where(np.isfinite(x), -finite / np.expm1(np.minimum(finite, 700)), 0.0)
        return np.log(-np.expm1(-x)) + np.log(-np.expm1(-bits[:, 1] / GAMMA_A)), slope

    def loss(
        self, theta: np.ndarray, N: np.ndarray, D: np.ndarray, arm: str | Sequence[str]
    ) -> np.ndarray:
        """Predicted losses [R, n] in nats, for theta [R, P] or [P] (then R = 1)."""
        theta = np.atleast_2d(theta)
        N, D = np.broadcast_arrays(*np.atleast_1d(np.asarray(N, float), np.asarray(D, float)))
        index = self.index([arm] * len(N) if isinstance(arm, str) else arm)
        U = self.exponents(theta, self.design(N, D, index), index)
        return np.exp(logsumexp(U)[0])

    def arm_terms(self, theta: np.ndarray, arm: str) -> dict[str, np.ndarray]:
        """An arm's own E, A, alpha, B, beta and powers p, q as [R]: L = E + A N^(p - alpha)
        (D / D0)^q N0^-p + ..., the factor eta taken into A."""
        theta = np.atleast_2d(theta)
        k = self.index([arm])[0]
        at = {name: theta[:, i] for i, name in enumerate(self.names)}
        zero = np.zeros(len(theta))
        own = {
            name: at.get(f"{name}[{arm}]", zero) if k else zero for name in (*BASE, "h", "p", "q")
        }
        a = at["a"] + own["a"] + own["h"]
        if self.form == "precision":
            a = a - at["alpha"] * self._log_factor(theta)[0][:, k]
        return {
            "E": np.exp(at["e"] + own["e"]), "A": np.exp(a), "B": np.exp(at["b"] + own["b"]),
            "alpha": at["alpha"] + own["alpha"], "beta": at["beta"] + own["beta"],
            "p": own["p"], "q": own["q"],
        }  # fmt: skip

    def natural(self, theta: np.ndarray) -> dict[str, np.ndarray]:
        """What a reader wants to see, each [R]: the reference's A, B, E, alpha, beta, and of the
        other arms what the form lets them change."""
        theta = np.atleast_2d(theta)
        reference = self.arm_terms(theta, self.arms[0])
        shown = {name: reference[name] for name in ("A", "B", "E", "alpha", "beta")}
        if self.form == "precision":
            shown["A"] = np.exp(theta[:, 0])
            shown["gamma_w"] = np.exp(theta[:, -1])
        for i, arm in enumerate(self.arms[1:]):
            terms = self.arm_terms(theta, arm)
            offsets = OFFSETS[self.form]
            if "h" in offsets:
                h = theta[:, len(BASE) + i * len(offsets)]
                shown[f"eta[{arm}]"] = np.exp(-h / shown["alpha"])
            if self.form == "precision":
                shown[f"eta[{arm}]"] = np.exp(self._log_factor(theta)[0][:, i + 1])
            if "p" in offsets:  # N_eff / N goes as N^(-p / alpha) D^(-q / alpha)
                shown[f"N power[{arm}]"] = -terms["p"] / shown["alpha"]
                shown[f"D power[{arm}]"] = -terms["q"] / shown["alpha"]
            for name, upper in (
                ("e", "E"),
                ("a", "A"),
                ("b", "B"),
                ("alpha", "alpha"),
                ("beta", "beta"),
            ):
                if name in offsets:
                    shown[f"{upper}[{arm}]"] = terms[upper]
        return shown


def logsumexp(U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Over axis 1 of [R, 3, n]: values [R, n], and the terms' shares [R, 3, n] (a softmax)."""
    top = U.max(1)
    terms = np.exp(U - top[:, None])
    total = terms.sum(1)
    return top + np.log(total), terms / total[:, None]
