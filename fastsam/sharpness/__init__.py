"""Measures of flatness: sharpness, eigenvalues of the Hessian, pictures of the loss around a minimum."""

from fastsam.sharpness.hessian import HessianEigenvalues, PowerIteration, hessian_eigenvalues, power_iteration
from fastsam.sharpness.landscape import Landscape, landscape, line
from fastsam.sharpness.measures import GradientCosine, Sharpness, gradient_cosine, m_sharpness, sam_sharpness
from fastsam.sharpness.spectrum import Spectrum, spectrum

__all__ = [
    "GradientCosine",
    "HessianEigenvalues",
    "Landscape",
    "PowerIteration",
    "Sharpness",
    "Spectrum",
    "gradient_cosine",
    "hessian_eigenvalues",
    "landscape",
    "line",
    "m_sharpness",
    "power_iteration",
    "sam_sharpness",
    "spectrum",
]
