"""`report`: one HTML page of a run folder."""
