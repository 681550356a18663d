"""`export`: a checkpoint for other programs: ONNX Runtime, torch.export, diffusers, a page in a browser."""
