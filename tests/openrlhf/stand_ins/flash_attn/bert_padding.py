def never(*arguments, **more):
    raise AssertionError("flash-attn is not here; it is stood in for")


index_first_axis = pad_input = rearrange = unpad_input = never
