"""Loads this model in transformers with `trust_remote_code=True`, once `pip install timm-smpconv` was run.

The classes are transformers' own for timm's models, under the names by which its pipelines know them. What they lack is
the import that registers the model with timm.
"""
import transformers

import timm_smpconv as timm_smpconv


class TimmWrapperModel(transformers.TimmWrapperModel):
    """Features and embeddings: for `AutoModel`."""


class TimmWrapperForImageClassification(transformers.TimmWrapperForImageClassification):
    """For `AutoModelForImageClassification` and `pipeline("image-classification")`."""
