"""Grows the generator of a bundled model into the first weights of a recipe (`Recipe.grown`)."""

from ..checkpoint import find_checkpoint
from ..data.rendered import render_clips
from ..model.latent_relation import LatentRelation, fit_relation
from ..model.world_model import WorldModel
from ..training.recipe import Recipe
from ..vae import CausalVAE
from ..vae.folder import ORIGINAL, load_vae, vae_digest

STAGE = "growth"
FIT_CLIPS = 24  # the relation is of 80 numbers per token, and a clip has thousands of tokens


def grow(recipe: Recipe, vae: CausalVAE, workers: int) -> WorldModel:
    """Return a model with the weights that grow from the bundled generator `recipe.grown`.

    vae: encodes the recipe's clips. Unless the bundled generator has the autoencoder `vae`, the
    relation of their latents is fitted to the first clips of the recipe's first set.
    """
    folder = find_checkpoint(recipe.grown)
    model = WorldModel(recipe.model, recipe.camera)
    model.load_grown(folder, _relation(load_vae(folder, ORIGINAL), vae, recipe, workers))
    return model


def _relation(
    coarse: CausalVAE, fine: CausalVAE, recipe: Recipe, workers: int
) -> LatentRelation | None:
    """Fit the relation of two autoencoders, None if they are one."""
    if vae_digest(coarse) == vae_digest(fine):
        return None
    data = next(iter(recipe.data.values()))
    clips = list(render_clips(data, workers, min(FIT_CLIPS, data.clips)))
    return fit_relation(*(data.encode(vae, clips)["latents"] for vae in (coarse, fine)))
