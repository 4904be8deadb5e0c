"""How far results may be from the truth: a bound counted from the roundings of the computation, whatever their luck."""

import math

import torch

EXP_AND_DIVISION = 4
"""Roundings that exp, log and a division stand for: 2 units in the last place, as a GPU's fast ones may err."""
ADDITIONS = 4
"""Roundings of a whole sum that the additions of many terms come to."""
LARGEST_SHARE = 3
"""Root mean squares that independent roundings of many terms come to, together."""


class Bounded:
    """Numbers in float64, each with a bound on the error of one that arithmetic in `dtype` has computed instead.

    Formulas written with these numbers give the truth and the bound at once (a running error analysis: Higham,
    "Accuracy and Stability of Numerical Algorithms", section 3.3). With u half a unit in the last place of `dtype`:

    - +, - and * carry over the errors of their operands, at their worst and all of one sign, and make one
      rounding, u times the size of the result; so what cancels keeps the errors of the terms, relative to their size.
      So does sqrt with two roundings, since a library's need not be the nearest number.
    - A Python number is rounded once when it enters, unless `dtype` has it.
    - exp, log and / make 4 roundings, 2 units in the last place. exp(x) may be 2^(x log2(e)): its argument is rounded
      twice more, for the factor and for the product, which gives 2 |x| u exp(x).
    - A sum carries over the errors of all its terms at their worst. Its own additions are many and of either sign. In
      a tree, in lanes or in blocks their sizes fall by half from level to level from the top, and their number doubles:
      the root mean square of all is below sqrt(1 + 1/2 + 1/4 + ...) u / sqrt(3) = 0.8 u of the sum of sizes. The
      bound is 5 times that, 4 u, and never more roundings than additions.
    - A norm's squares are many and independent, so their errors count by 3 root mean squares (5 times the standard
      deviation of roundings, which is their bound over sqrt(3)), where that is less than all of them at their worst.

    Where `dtype` is float64 the truth makes the same roundings itself, and u counts twice.
    """

    def __init__(self, value, error, dtype):
        self.value, self.error, self.dtype = value, error, dtype
        self.unit = torch.finfo(dtype).eps / (1 if dtype == torch.float64 else 2)

    @classmethod
    def exact(cls, tensor, dtype=torch.float64):
        """A tensor that is given, for arithmetic in `dtype`; one that is wider is rounded to it first."""
        value = tensor.double()
        return cls(value, (tensor.to(dtype).double() - value).abs(), dtype)

    def to(self, dtype):
        """The same for arithmetic in `dtype`; where that is narrower the numbers are rounded to it."""
        made = Bounded(self.value, self.error, dtype)
        return (
            made if torch.finfo(dtype).bits >= torch.finfo(self.dtype).bits else made._rounded(made.value, made.error)
        )

    def _rounded(self, value, error, roundings=1.0):
        return Bounded(value, error + roundings * self.unit * (value.abs() + error), self.dtype)

    def _of(self, other):
        if isinstance(other, Bounded):
            return other
        value = torch.tensor(other, dtype=torch.float64, device=self.value.device)
        return Bounded(value, value.abs() * self.unit * (value.to(self.dtype) != value), self.dtype)

    def __add__(self, other):
        other = self._of(other)
        return self._rounded(self.value + other.value, self.error + other.error)

    def __mul__(self, other):
        other = self._of(other)
        error = self.value.abs() * other.error + other.value.abs() * self.error + self.error * other.error
        return self._rounded(self.value * other.value, error)

    def __truediv__(self, other):
        other = self._of(other)
        value = self.value / other.value
        nearest = (other.value.abs() - other.error).clamp(min=0)
        return self._rounded(value, (self.error + value.abs() * other.error) / nearest, EXP_AND_DIVISION)

    def __neg__(self):
        return Bounded(-self.value, self.error, self.dtype)

    def __sub__(self, other):
        return self + -self._of(other)

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other):
        return -self + other

    def __rtruediv__(self, other):
        return self._of(other) / self

    def abs(self):
        return Bounded(self.value.abs(), self.error, self.dtype)

    def sqrt(self):
        value = self.value.sqrt()
        return self._rounded(value, value - (self.value - self.error).clamp(min=0).sqrt(), 2)

    def exp(self):
        value = self.value.exp()
        made = self._rounded(value, value * self.error.expm1(), EXP_AND_DIVISION + 2 * self.value.abs())
        made.error += torch.finfo(self.dtype).tiny  # below it a GPU may give 0
        return made

    def log(self):
        return self._rounded(self.value.log(), -(-self.error / self.value).log1p(), EXP_AND_DIVISION)

    def sum(self, dim=-1):
        """The sum over a dimension, which stays with size 1."""
        n = self.value.shape[dim]
        additions = min(max(n - 1, 0), ADDITIONS) * self.unit * (self.value.abs() + self.error).sum(dim, keepdim=True)
        error = self.error.sum(dim, keepdim=True) + additions
        return Bounded(self.value.sum(dim, keepdim=True), error, self.dtype)

    def where(self, mask):
        """The same where the mask holds, elsewhere an exact 0."""
        value, error = (torch.where(mask, t, 0.0) for t in (self.value, self.error))
        return Bounded(value, error, self.dtype)


def average(old, new, decay):
    """The moving average decay old + (1 - decay) new, however it is written: so, or from either side's difference."""
    difference = new - old
    ways = [decay * old + (1 - decay) * new, old + (1 - decay) * difference, new - decay * difference]
    return Bounded(ways[0].value, torch.stack([way.error for way in ways]).amax(0), old.dtype)


def norm(parts):
    """The 2-norm of all numbers in `parts`, summed in each part's own dtype and over them in float64."""
    value = error = 0.0
    for part in parts:
        squares = part * part
        independent = LARGEST_SHARE * (squares.error**2).sum().sqrt()
        own = torch.minimum(squares.error.sum(), independent)
        additions = min(max(squares.value.numel() - 1, 0), ADDITIONS) * squares.unit * squares.value.sum()
        value, error = value + squares.value.sum(), error + own + additions
    total = Bounded(value, error, torch.float64)
    return total._rounded(value, error, ADDITIONS).sqrt()


def share_of_bound(found, expected):
    """The largest error of any element in units of its bound; NaN where either is.

    Args:
        found: tensors, as the code under test has left them.
        expected: for each the truth, `Bounded`; rounding to the tensor's own dtype, where that is narrower than the
            arithmetic's, is added here.
    """
    shares = [0.0]
    for tensor, truth in zip(found, expected, strict=True):
        assert tensor.shape == truth.value.shape, f"shape {tuple(tensor.shape)}, expected {tuple(truth.value.shape)}"
        info, room = torch.finfo(tensor.dtype), truth.error
        if info.bits < torch.finfo(truth.dtype).bits:
            smallest = info.tiny * info.eps
            room = room + (info.eps / 2 * (truth.value.abs() + truth.error)).clamp(min=smallest / 2)
        error = (tensor.double() - truth.value).abs()
        share = torch.where(error == 0, 0.0, error / room)
        shares += [share.amax().item()] if share.numel() else []
    return math.nan if any(map(math.isnan, shares)) else max(shares)


def assert_as_exact(found, expected):
    """Every element within the bound of its own roundings; see `Bounded` and `share_of_bound`."""
    for i, (tensor, truth) in enumerate(zip(found, expected, strict=True)):
        share = share_of_bound([tensor], [truth])
        assert share <= 1, f"tensor {i}, {tensor.dtype} {tuple(tensor.shape)}: an error is {share:.3g} of its bound"
