"""Other people's trainers, told to let the auxiliary losses follow the loss; each file needs its own library.

- `vmoe_torch.trainers.transformers`: a mixin for transformers' Trainer.
- `vmoe_torch.trainers.accelerate`: for an Accelerator.
- `vmoe_torch.trainers.lightning`: a callback for Lightning's Trainer.
- `vmoe_torch.trainers.fabric`: for a loop with Lightning Fabric.

timm's train.py has `vmoe_torch.timm_train`, an own loop `vmoe_torch.follow_loss_scale`.
"""
