"""The refinement network: `Refiner.from_checkpoint().refine(image, masks)`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.refiner import Refiner

__all__ = ["Refiner"]


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def __getattr__(name: str) -> Any:
    # Loads torch, which takes seconds: only once somebody asks for it.
    if name == "Refiner":
        from model.refiner import Refiner

        return Refiner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
