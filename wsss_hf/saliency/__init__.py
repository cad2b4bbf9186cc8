"""Saliency maps: from a network in ONNX or of transformers, or from the features of a backbone."""
