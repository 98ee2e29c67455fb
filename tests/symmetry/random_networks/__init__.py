"""Random networks; importing them registers all bricks, those for all data first."""

from tests.symmetry.random_networks import bricks, bricks_of_images_and_tokens

__all__ = ["bricks", "bricks_of_images_and_tokens"]
