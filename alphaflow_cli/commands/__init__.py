"""One verb, one file: parse, check paths, call one engine function, print."""
