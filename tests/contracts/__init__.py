"""What we lean on in libraries beyond what they promise: one file each, and one test for each thing.

They fail first when an upgrade takes something away, and say what of ours used it. What a library's own documentation
promises is not tested here.
"""
