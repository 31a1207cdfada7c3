"""Recipes: YAML files with the training settings of the paper.

The recipes of the sequence networks are for `timm-smpconv sequence fit --config FILE`, all others for timm's
`train.py -c FILE`.
"""
from pathlib import Path
from typing import List

__all__ = ['recipe_names', 'recipe_path']

_FOLDER = Path(__file__).parent


def recipe_names() -> List[str]:
    """The names of the recipes. Each is the name of a model.

    Example:
        >>> from timm_smpconv.training.recipes import recipe_names
        >>> 'smpconv_tiny' in recipe_names()
        True
    """
    return sorted(path.stem for path in _FOLDER.glob('*.yaml'))


def recipe_path(name: str) -> Path:
    """The path of a recipe.

    Raises:
        ValueError: There is no such recipe.

    Example:
        >>> from timm_smpconv.training.recipes import recipe_path
        >>> recipe_path('smpconv_tiny').name
        'smpconv_tiny.yaml'
    """
    if name not in recipe_names():
        raise ValueError(f'name must be one of {", ".join(recipe_names())}, got {name!r}')
    return _FOLDER / f'{name}.yaml'
