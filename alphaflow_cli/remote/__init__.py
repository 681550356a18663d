"""The way to the Hub: a client that bounds and checks every answer, and what can go wrong with it."""
