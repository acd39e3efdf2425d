"""Behind `efficient-attn convert` and `efficient-attn inspect`.

inputs.py     a model and what it reads, from folders, texts, images, tables and tensors
convert.py    convert a model within a budget: a plan as JSON and a page
inspect.py    what its attention does on one input; gathered.py: the figures of the page, page.html: the page
"""
