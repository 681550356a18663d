"""`push`: a run or a checkpoint to the Hub, with its model card, and a Space that samples it."""
