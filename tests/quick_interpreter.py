"""Triton's interpreter without what it does at every operation to no effect."""

from __future__ import annotations

from triton import language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def install() -> None:
    """What the kernels compute stays the same, bit for bit."""
    # Every sum and product of integers is done again in 64 bits for an assertion that only the option debug would make.
    if not interpreter.interpreter_builder.options.debug:
        interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    _look_up_dtypes_once()
    _make_types_once()
    _cast_once()
    if hasattr(interpreter, "_LangPatchScope"):  # since Triton 3.6
        _patch_modules_once_a_launch()


def _patch_modules_once_a_launch() -> None:
    """Each call of a device function would replace triton.language's functions again, as its launch has done."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[str] = set()

    def patch_once(function):
        if function.__module__ in patched:
            return interpreter._LangPatchScope()
        patched.add(function.__module__)
        return patch(function)

    def launch_afresh(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_afresh


def _look_up_dtypes_once() -> None:
    """Each question would build the table anew."""
    look_up, known = interpreter._get_np_dtype, {}

    def looked_up(dtype):
        name = dtype.scalar.name
        if name not in known:
            known[name] = look_up(dtype)
        return known[name]

    interpreter._get_np_dtype = looked_up


def _make_types_once() -> None:
    """Each value would check its shape, spell its type's name and wrap every number of the shape anew."""
    make_type, make_value, known = tl.block_type.__init__, tl.tensor.__init__, {}

    def key_of(element, shape):
        return element.name, getattr(element, "const", None), *(getattr(size, "value", size) for size in shape)

    def new_type(cls, element_ty, shape):
        return known.get(key_of(element_ty, shape)) or object.__new__(cls)

    def init_type(self, element_ty, shape):
        if not vars(self):
            make_type(self, element_ty, shape)
            known[key_of(element_ty, shape)] = self

    def init_value(self, handle, type):
        if "of_a_value" in vars(type):
            vars(self).update(type.of_a_value)
            self.handle = handle
        else:
            make_value(self, handle, type)
            type.of_a_value = {name: value for name, value in vars(self).items() if name != "handle"}

    tl.block_type.__new__, tl.block_type.__init__, tl.tensor.__init__ = new_type, init_type, init_value


def _cast_once() -> None:
    """Values of one type are neither cast nor broadcast, but in divisions; a number beside one type is always one value."""
    cast, numbers = TritonSemantic.binary_op_type_checking_impl, {}

    def cast_unless_known(self, lhs, rhs, *args, **kwargs):
        values = [side for side in (lhs, rhs) if isinstance(side, tl.tensor)]
        if not values or kwargs or values[0].dtype.is_ptr():
            return cast(self, lhs, rhs, *args, **kwargs)
        if len(values) == 2:
            return (lhs, rhs) if lhs.type is rhs.type and len(args) < 4 else cast(self, lhs, rhs, *args)
        place = 0 if values[0] is lhs else 1  # the value's; the other is a number
        number = (rhs, lhs)[place]
        key = id(values[0].type), place, type(number), repr(number), args
        if key in numbers:
            return (lhs, numbers[key]) if place == 0 else (numbers[key], rhs)
        both = cast(self, lhs, rhs, *args)
        if both[place] is values[0]:
            numbers[key] = both[1 - place]
        return both

    TritonSemantic.binary_op_type_checking_impl = cast_unless_known
