"""One verb, one file: parse, check paths, call one function of the verb's room, print."""
