"""The weights of this package: where they come from, their verified conversion, and the cache of converted ones.

`sources.yaml` lists them. `drive` downloads the authors' files, `convert` turns them into folders as the Hugging Face
Hub has them, verified by the plain networks in `authors_imagenet` and `authors_smp`, and `cache` keeps the folders for
`pretrained=True`. `command` is `timm-smpconv weights`.
"""
