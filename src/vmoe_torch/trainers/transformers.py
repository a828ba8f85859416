"""transformers: a Trainer whose auxiliary losses are averaged over the accumulation steps, scaled as the loss is.

class MyTrainer(FollowLossScale, Trainer):
    pass
"""

from vmoe_torch.trainers.accelerate import follow


class FollowLossScale:
    """Mixin for `transformers.Trainer` or a class of its kind, before it in the bases.

    Who divides by the accumulation steps depends on the model: the Trainer, or the loss itself where it is given
    `num_items_in_batch`. So the loss is followed behind that division, with its weight.
    """

    def create_accelerator_and_postprocess(self) -> None:
        """The Trainer's, then made to follow."""
        super().create_accelerator_and_postprocess()
        follow(self.accelerator, self._auxiliary_weight)

    def _auxiliary_weight(self) -> float:
        # Each of several GPUs in one process injects what it has seen.
        return 1.0 / (self.current_gradient_accumulation_steps * max(self.args.n_gpu, 1))
