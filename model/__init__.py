"""The refinement network: `Refiner.from_checkpoint().refine(image, masks)`."""

from model.refiner import Refiner

__all__ = ["Refiner"]
