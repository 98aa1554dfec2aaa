"""What a dump costs on GPUs, from measured handling and the rate of a GPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CostModel:
    """Everything that follows from three numbers."""

    patches_per_frame: float
    handling_cpu_ms: float
    """CPU milliseconds per frame outside the network."""
    gpu_patches_per_s: float
    measured: bool
    """Whether the GPU's rate was measured here, or is taken from elsewhere."""

    @property
    def frames_per_gpu_hour(self) -> float:
        return 3600 * self.gpu_patches_per_s / self.patches_per_frame

    @property
    def cores_per_gpu(self) -> float:
        """CPU cores that keep one GPU busy."""
        frames_per_s = self.gpu_patches_per_s / self.patches_per_frame
        return frames_per_s * self.handling_cpu_ms / 1e3

    def hours(self, frames: int, gpus: int) -> float:
        """For a dump, with the cores that the GPUs need."""
        return frames / (gpus * self.frames_per_gpu_hour)

    def text(self, frames: int = 1_000_000) -> str:
        """The model as lines, for some numbers of GPUs."""
        return "\n".join(
            [
                f"cost of {frames:,} frames of {self.patches_per_frame:.0f} patches,"
                f" {'with the' if self.measured else 'ASSUMING'} {self.gpu_patches_per_s:,.0f} patches/s"
                f" {'measured on this GPU' if self.measured else 'on a GPU'}:",
                f"  {float(f'{self.frames_per_gpu_hour:.2g}'):,.0f} frames per GPU hour,"
                f" {_hours(frames / self.frames_per_gpu_hour, 'GPU ')} in all;"
                f" {self.cores_per_gpu:.1f} CPU cores keep one GPU busy",
                *(
                    f"  {gpus:>3} GPUs, {gpus * self.cores_per_gpu:5.0f} cores: {_hours(self.hours(frames, gpus)):>14}"
                    for gpus in (1, 4, 16, 64)
                ),
            ]
        )


def _hours(hours: float, of: str = "") -> str:
    """A time as text, in minutes below one hour."""
    if hours >= 1:
        return f"{hours:,.1f} {of}hours"
    return f"{60 * hours:.{0 if 60 * hours >= 10 else 1}f} {of}minutes"
