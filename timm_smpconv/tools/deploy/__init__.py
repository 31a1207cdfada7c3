"""`timm-smpconv deploy`: from a checkpoint to verified, quantised and measured files. Needs the extra `deploy`."""
