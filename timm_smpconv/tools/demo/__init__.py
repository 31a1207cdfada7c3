"""`timm-smpconv demo`, and the handwritten digits it trains on. Needs the extra `demo`."""
