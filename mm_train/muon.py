"""Muon: momentum, and of it the nearest matrix with orthogonal rows or columns, for the matrices of hidden layers.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv 2502.16982, for weight decay and a
step as large as AdamW's. torch.optim.Muon (2.13) does the same for whole 2-D parameters in bfloat16, and tests compare
with it; it has neither stacks of experts nor parts of a matrix, which is what ZeRO leaves on a rank. Gate and up
projection of an expert lie in one tensor and are two matrices. Axes: N matrices of R rows and C columns.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mm_train import config, inventory
from mm_train.sharding import Place, local_box, tensor_parallel_axis

COEFFICIENTS, STEPS = (3.4445, -4.7750, 2.0315), 5  # Jordan's: singular values end between 0.7 and 1.2
EPS = 1e-7
CHUNK = 1 << 25  # elements orthogonalised at a time: bounds the working memory


class Matrices(NamedTuple):
    """How a tensor is made of matrices, as far as a rank holds it."""

    rows: int  # of this rank's part of one
    columns: int
    blocks: int = 1  # matrices side by side in the columns: gate and up
    scale: float = 1.0  # of the update
    axis: int | None = None  # along which tensor parallelism cuts it: 0 rows, 1 columns

    @property
    def size(self) -> int:
        """Elements of this rank's part of one."""
        return self.rows * self.columns


class Whole(NamedTuple):
    """`number` matrices that follow each other in a vector, from element `offset` on."""

    offset: int
    number: int
    matrices: Matrices


class Cut(NamedTuple):
    """A part of matrix `which` of a tensor: its elements first..first + length, at `offset` of a vector."""

    offset: int
    which: int
    first: int
    length: int
    matrices: Matrices


def matrices_of(entry: inventory.Entry, place: Place, optim: config.Optim) -> Matrices:
    """The matrices of a tensor as the rank at `place` holds them.

    Linear weights are [out, in], those of experts [E, in, out].
    """
    *_, rows, columns = local_box(entry, place).shape
    blocks = 2 if entry.name.endswith("gate_up_proj") else 1
    height, width = entry.shape[-2], entry.shape[-1] // blocks
    fan_out, fan_in = (width, height) if entry.part == "routed experts" else (height, width)
    if optim.muon_adjust_lr == "original":
        scale = math.sqrt(max(1.0, fan_out / fan_in))
    else:  # the root mean square of an orthogonal matrix is 1 / sqrt(its longer side), of an AdamW step about 0.2
        scale = 0.2 * math.sqrt(max(fan_in, fan_out))
    return Matrices(rows, columns, blocks, scale, tensor_parallel_axis(entry))


def pieces(matrices: Matrices, offset: int, start: int, stop: int) -> tuple[list[Whole], list[Cut]]:
    """Elements start..stop of a tensor, which lie at `offset` of a vector, as whole matrices and at most two parts."""
    whole, cut, size = [], [], matrices.size
    while start < stop:
        first = start % size
        if first or stop - start < size:
            length = min(size - first, stop - start)
            cut.append(Cut(offset, start // size, first, length, matrices))
        else:
            length = (stop - start) // size * size
            whole.append(Whole(offset, length // size, matrices))
        start, offset = start + length, offset + length
    return whole, cut


def newton_schulz(stack_NRC: Tensor, dtype: torch.dtype) -> Tensor:
    """Each matrix with its singular values brought near 1, in `dtype`; matrices of zeros stay."""
    x = stack_NRC.float()
    x = (x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=EPS)).to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT.contiguous() if tall else x
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


Gather = Callable[[Tensor, int], tuple[Tensor, int]]  # part, axis -> whole, where along `axis` the part begins
Complete = Callable[[Tensor, list[Tensor]], list[Tensor]]  # parameter, its parts of matrices -> those matrices, flat


class MuonAdamW(torch.optim.AdamW):
    """Muon for the groups whose "algorithm" says so, AdamW for the rest.

    Before the first step `lay_out` has to say what the parameters of Muon's groups are made of: they may be tensors, or
    vectors into which ZeRO has put parts of them. Where matrices are cut, over tensor-parallel ranks or by ZeRO,
    `gather` and `complete` get what is missing. State: "exp_avg", the mean of the gradients.
    """

    gather: Gather | None = None
    complete: Complete | None = None

    def __init__(self, groups: list[dict], optim: config.Optim, dtype: torch.dtype) -> None:
        super().__init__(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
        self.momentum, self.dtype = optim.momentum, dtype
        self._layout: dict[Tensor, tuple[Sequence[Whole], Sequence[Cut]]] = {}

    def lay_out(self, parameter: Tensor, whole: Sequence[Whole], cut: Sequence[Cut] = ()) -> None:
        """Say where in `parameter`, row by row, matrices and parts of matrices lie."""
        self._layout[parameter] = whole, cut

    @torch.no_grad()
    def step(self, closure=None):
        """Muon takes its gradients away, AdamW steps with those that are left."""
        for group in self.param_groups:
            if group["algorithm"] == "muon":
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._move(parameter, parameter.grad, group["lr"], group["weight_decay"])
                        parameter.grad = None
        return super().step(closure)

    def _move(self, parameter: Tensor, gradient: Tensor, rate: float, weight_decay: float) -> None:
        mean = self.state[parameter]["exp_avg"]
        mean.lerp_(gradient, 1 - self.momentum)
        weight, mean, gradient = parameter.view(-1), mean.view(-1), gradient.view(-1)
        weight.mul_(1 - rate * weight_decay)

        def ahead(offset: int, length: int) -> Tensor:
            """Nesterov's momentum."""
            return gradient[offset : offset + length].lerp(mean[offset : offset + length], self.momentum)

        whole, cut = self._layout[parameter]
        parts = [ahead(part.offset, part.length) for part in cut]
        for offset, number, matrices in whole:
            most = max(1, CHUNK // matrices.size)
            for start in range(0, number, most):
                count = min(most, number - start)
                at, length = offset + start * matrices.size, count * matrices.size
                stack = ahead(at, length).view(count, matrices.rows, matrices.columns)
                update = self._orthogonal(stack, matrices)
                weight[at : at + length].add_(update.reshape(-1), alpha=-rate * matrices.scale)
        missing = self.complete(parameter, parts) if cut and self.complete else []
        for part, flat in zip(cut, missing, strict=True):
            matrices = part.matrices
            update = self._orthogonal(flat.view(1, matrices.rows, matrices.columns), matrices).reshape(-1)
            mine = update[part.first : part.first + part.length]
            weight[part.offset : part.offset + part.length].add_(mine, alpha=-rate * matrices.scale)

    def _orthogonal(self, stack_NRC: Tensor, matrices: Matrices) -> Tensor:
        """What newton_schulz makes of a rank's part of matrices, in float32."""
        if matrices.axis is None or self.gather is None:
            return self._of_whole(stack_NRC, matrices.blocks)
        axis = matrices.axis + 1
        whole_NRC, begin = self.gather(stack_NRC, axis)
        return self._of_whole(whole_NRC, matrices.blocks).narrow(axis, begin, stack_NRC.shape[axis])

    def _of_whole(self, stack_NRC: Tensor, blocks: int) -> Tensor:
        """The same of whole matrices, of which each consists of `blocks` side by side."""
        number, rows, columns = stack_NRC.shape
        apart = stack_NRC.view(number, rows, blocks, -1).transpose(1, 2).flatten(0, 1)
        update = newton_schulz(apart, self.dtype).view(number, blocks, rows, -1)
        return update.transpose(1, 2).reshape(number, rows, columns).float()
