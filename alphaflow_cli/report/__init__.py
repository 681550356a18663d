"""Pictures: line charts as SVG and PNG from one description. Plain numbers in, no torch."""
