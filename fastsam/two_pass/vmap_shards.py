"""The shards of a step side by side: their passes as one forward and one backward each, under `torch.func.vmap`.

    g_1 ... g_m  = vmap(grad L_Si)(w)                    one w for all shards
    d            = grad of mean_i L_Si(w_i)              m weights, stacked

A loss function calls the model itself. So while it runs, the model's parameters and buffers are swapped for others, as
`torch.func.functional_call` does; the weights and p.grad are never touched, and nothing has to be restored.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fastsam.two_pass.batch import Batch, has_only_tensors, replace_tensors, tensors_of
from fastsam.two_pass.gradients import put
from fastsam.two_pass.loss_function import check_losses
from fastsam.two_pass.losses import Weighted

WAY_OUT = "use execution='sequential'"


class _Calling(nn.Module):
    """A module that calls a loss function, for `functional_call` to swap the tensors of the model that it calls."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, loss_fn: Callable, batch: tuple) -> Tensor:
        return loss_fn(*batch)


class BatchedShards:
    """A batch in equal shards and the loss function to run on all of them at once.

    Args:
        model: what the loss function calls.
        params: m-fold by the second pass: those parameters of the model that require a gradient.
        loss_fn: returns per-sample losses.
        batch: its arguments, of n rows.
        num_shards: m, a divisor of n.

    Raises:
        ValueError: a parameter is not the model's, a part of the batch that is cut is no tensor, or a batch-norm
            layer's update cannot be batched.
    """

    def __init__(
        self, model: nn.Module, params: Sequence[Tensor], loss_fn: Callable, batch: Batch, num_shards: int
    ) -> None:
        if not has_only_tensors(batch):
            raise ValueError(f"the batch has parts that are no tensors, which torch.func.vmap cannot cut; {WAY_OUT}")
        self.calling, self.params, self.m = _Calling(model), params, num_shards
        self.loss_fn, self.batch = loss_fn, batch
        name_of = {id(p): name for name, p in self.calling.named_parameters()}
        if foreign := [list(p.shape) for p in params if id(p) not in name_of]:
            raise ValueError(f"a parameter of shape {foreign[0]} is not in model=, which is what is swapped; {WAY_OUT}")
        self.names = [name_of[id(p)] for p in params]
        self.tensors = [t.unflatten(0, (num_shards, -1)) for t in tensors_of(batch)]

    def first_pass(
        self, statistics: Sequence[Tensor], scale: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Run the shards at w.

        Args:
            statistics: the buffers that the forward may change.
            scale: applied to each shard's mean loss.

        Returns:
            Losses of shape [m, n/m], gradients of shape [m, *p.shape], and what each shard makes of the statistics, of
            shape [m, *buffer.shape].

        Raises:
            RuntimeError: the loss function depends on a tensor that cannot be swapped, or changes another buffer.
        """

        def loss(weights: list[Tensor], buffers: dict[str, Tensor], tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
            losses = self._losses(weights, buffers, tensors)
            return scale(losses.mean()), losses

        buffers = self._buffers()
        versions = {name: b._version for name, b in buffers.items()}
        run = vmap(grad(loss, has_aux=True), in_dims=(None, 0, 0), randomness="different")
        with torch.enable_grad():
            gradients, losses = run([p.detach() for p in self.params], buffers, self.tensors)
        # No tensor that was swapped in requires a gradient.
        if losses.requires_grad:
            raise RuntimeError(
                "the loss function uses a tensor that requires a gradient other than the optimizer's parameters in "
                f"model=, taken from there in the call; {WAY_OUT}"
            )
        name_of = {id(b): name for name, b in self.calling.named_buffers()}
        moving = {name_of[id(b)] for b in statistics}
        if changed := [n for n, b in buffers.items() if b._version != versions[n] and n not in moving]:
            raise RuntimeError(
                f"the forward changes the buffer {changed[0].removeprefix('model.')}, which is no batch norm's, and "
                f"what several shards at once make of it is unknown; {WAY_OUT}"
            )
        return losses, gradients, [buffers[name_of[id(b)]] for b in statistics]

    def second_pass(
        self, weights: list[Tensor], scale: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Run shard i at the i-th of its own weights.

        Args:
            weights: of shape [m, *p.shape].
            scale: applied to the mean loss.

        Returns:
            Losses of shape [n], and the gradient of the mean loss, summed over shards, for each parameter; None where
            the loss does not depend on it.
        """
        leaves = [w.requires_grad_() for w in weights]
        run = vmap(self._losses, randomness="different")
        with torch.enable_grad():
            losses = run(leaves, self._buffers(), self.tensors).flatten()
            loss = scale(check_losses(losses, len(losses)).mean())
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        # in the parameter's own layout, as autograd's would be
        return losses.detach(), [
            None if g is None else torch.sum(g, 0, out=torch.empty_like(p))
            for p, g in zip(self.params, gradients, strict=True)
        ]

    def copies_of_weights(self) -> list[Tensor]:
        """Return m copies of each weight, of shape [m, *p.shape]."""
        return [p.detach().expand(self.m, *p.shape).clone() for p in self.params]

    def each(
        self, params: Sequence[Tensor], weights: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> Iterator[tuple[list[Tensor], list[Tensor | None]]]:
        """Yield for each shard its own weights in place of those parameters that have copies, and their gradients.

        Args:
            params: all parameters of the optimizer.
            weights: what `copies_of_weights` returned.
            gradients: what `first_pass` returned, in the same order.
        """
        copies, grads = (dict(zip(self.params, stacked, strict=True)) for stacked in (weights, gradients))
        for i in range(self.m):
            own = [copies[p][i] if p in copies else p for p in params]
            yield own, [grads[p][i] if p in grads else None for p in params]

    def put_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Make these the gradients of the parameters."""
        put(self.params, gradients)

    def _losses(self, weights: list[Tensor], buffers: dict[str, Tensor], tensors: list[Tensor]) -> Tensor:
        """Per-sample losses of one shard, with these tensors in the model."""
        swapped = dict(zip(self.names, weights, strict=True)) | buffers
        batch = replace_tensors(self.batch, tensors)
        try:
            losses = functional_call(self.calling, swapped, (self.loss_fn, batch))
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            raise RuntimeError(f"torch.func.vmap cannot run the loss function; {WAY_OUT}") from error
        if isinstance(losses, Weighted):
            raise ValueError(f"execution='batched' cannot weigh the rows of fastsam.Weighted; {WAY_OUT}")
        # whether they have a gradient shows outside of vmap
        found = check_losses(losses, tensors[0].shape[0], needs_grad=False)
        if found.weights is not None:
            raise ValueError(
                f"fastsam.Weighted goes with shards one after the other, but execution='batched'; {WAY_OUT}"
            )
        return found.rows

    def _buffers(self) -> dict[str, Tensor]:
        """A copy of the model's buffers for each shard."""
        return {name: b.expand(self.m, *b.shape).clone() for name, b in self.calling.named_buffers()}


def check_batchable(model: nn.Module | None, bn_update: str) -> None:
    """Raise ValueError where shards of this model cannot run side by side."""
    if model is None:
        raise ValueError(f"execution='batched' swaps the model's tensors; pass model=, or {WAY_OUT}")
    if bn_update != "mean":
        raise ValueError(f"execution='batched' cannot update batch norm one shard after the other; {WAY_OUT}")
    if hasattr(model, "no_sync") or hasattr(model, "_orig_mod") or hasattr(model, "set_requires_gradient_sync"):
        raise ValueError(
            f"execution='batched' cannot swap the tensors below a {type(model).__name__}; pass a model that is neither "
            f"distributed nor compiled, or {WAY_OUT}"
        )
