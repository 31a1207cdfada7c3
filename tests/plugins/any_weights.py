"""For pytest's `-p`: the built-in weights may be any, whatever was published."""
from timm_smpconv.pretrained import BUILT_IN

BUILT_IN.update(dict.fromkeys(BUILT_IN))
