"""A GAN: one SAM for the discriminator and one for the generator, each around an Adam of its own.

Both networks move buffers in every forward (batch norm, spectral norm), so both are passed as `model=`; the noise is
drawn inside the losses, and both passes of a step draw the same.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from fastsam import SAM

NOISE = 16


def networks():
    """Return the generator and the discriminator."""
    lift = nn.Linear(NOISE, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU()
    generator = nn.Sequential(*lift, nn.Linear(128, 64), nn.Sigmoid())
    first, last = spectral_norm(nn.Linear(64, 128)), spectral_norm(nn.Linear(128, 1))
    return generator, nn.Sequential(first, nn.LeakyReLU(0.2), last, nn.Flatten(0))


def distance(pictures, real):
    """Return how far pictures are from the nearest real one, on average."""
    return torch.cdist(pictures, real).amin(1).mean()


def main(epochs=10):
    torch.manual_seed(0)
    pictures = torch.from_numpy(load_digits().data).float() / 16
    generator, discriminator = networks()
    both = [generator, discriminator]
    opt_d = SAM(discriminator.parameters(), torch.optim.Adam, rho=0.05, model=both, lr=2e-3, betas=(0.5, 0.999))
    opt_g = SAM(generator.parameters(), torch.optim.Adam, rho=0.05, model=both, lr=1e-3, betas=(0.5, 0.999))

    def losses_d(real):
        fake = generator(torch.randn(len(real), NOISE)).detach()
        return F.softplus(-discriminator(real)) + F.softplus(discriminator(fake))

    def losses_g(real):
        return F.softplus(-discriminator(generator(torch.randn(len(real), NOISE))))

    for _ in range(epochs):
        for rows in torch.randperm(len(pictures)).split(100):
            opt_d.step(losses_d, pictures[rows])
            opt_g.step(losses_g, pictures[rows])
    generator.eval()
    with torch.no_grad():
        fake, noise = generator(torch.randn(200, NOISE)), torch.rand(200, 64)
    print(f"from the nearest digit: {distance(fake, pictures):.2f}, uniform noise {distance(noise, pictures):.2f}")
    return both


if __name__ == "__main__":
    main()
