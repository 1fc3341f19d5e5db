from .op import MeanFlowLoss, meanflow_loss

__all__ = ["MeanFlowLoss", "meanflow_loss"]
