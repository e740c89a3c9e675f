"""The training loop: a LightningModule around the model, and callbacks for all that is not the loss."""
