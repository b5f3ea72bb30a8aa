"""What a way of sharing a network among ranks asks of the recipe, told where the file is read."""

from __future__ import annotations

from tasks.spec.recipe import Mlp, Pretrained, Recipe, Transformer

# Ways that divide the network itself: they know what it is made of.
DIVIDING = ("tensor", "pipeline")
DIVIDED = {"mlp": Mlp, "transformer": Transformer, "pretrained": Pretrained}


def check_divides(parallel: str, recipe: Recipe, world: int) -> None:
    """Raise ValueError where a recipe can't be divided among ``world`` ranks in that way."""
    if recipe.kind not in DIVIDED:
        raise ValueError(
            f"parallel = {parallel!r}, must be ddp, fsdp or auto where recipe.kind is {recipe.kind!r}; "
            f"{' and '.join(DIVIDING)} divide {', '.join(DIVIDED)}"
        )
    if isinstance(recipe, Pretrained) and recipe.lora_rank:
        raise ValueError(f"recipe.lora_rank = {recipe.lora_rank}, must be 0 where parallel is {parallel!r}")
    check = {"tensor": _tensor, "pipeline": _pipeline}[parallel]
    check(recipe, world)


def _pipeline(recipe: Recipe, world: int) -> None:
    """Every rank has a dense layer of its own, or a layer of the encoder."""
    if isinstance(recipe, Mlp) and len(recipe.hidden) + 1 < world:
        raise ValueError(
            f"recipe.hidden = {recipe.hidden}, must have at least nodes x ranks / copies - 1 = {world - 1} widths "
            "where parallel is 'pipeline'"
        )
    if isinstance(recipe, Transformer) and recipe.layers < world:
        raise ValueError(
            f"recipe.layers = {recipe.layers}, must be at least nodes x ranks / copies = {world} where parallel is "
            "'pipeline'"
        )


def _tensor(recipe: Recipe, world: int) -> None:
    """Every rank has as many heads and hidden units; what one rank draws, the others would have to draw too."""
    if recipe.dropout:
        raise ValueError(f"recipe.dropout = {recipe.dropout}, must be 0 where parallel is 'tensor'; or parallel: ddp")
    if isinstance(recipe, Mlp):
        if not recipe.hidden:
            raise ValueError("recipe.hidden = (), must have a width where parallel is 'tensor'; or parallel: ddp")
        sizes = {f"hidden[{n}]": width for n, width in enumerate(recipe.hidden) if n % 2 == 0}
    else:
        # A pretrained encoder's sizes are in its folder, which a rank reads.
        drawn = isinstance(recipe, Transformer)
        sizes = {name: getattr(recipe, name) for name in ("heads", "feedforward")} if drawn else {}
    for name, size in sizes.items():
        if size % world:
            raise ValueError(
                f"recipe.{name} = {size}, must be a multiple of nodes x ranks / copies = {world} where parallel is "
                "'tensor'"
            )
