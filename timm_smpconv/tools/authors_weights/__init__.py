"""The authors' weights: their download, their verified conversion, and the cache of converted ones.

`timm_smpconv/weights/sources.yaml` lists them. `drive` downloads the authors' files, `conversion` turns them into
folders as the Hugging Face Hub has them, verified by the plain networks in `authors_imagenet` and `authors_smp`.
`command` is `timm-smpconv weights`.
"""
