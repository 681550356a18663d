"""Charts: the classes of chart.py describe what to show, the functions of draw.py draw it by matplotlib."""
