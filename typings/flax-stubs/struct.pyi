from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform, overload

_T = TypeVar("_T")

def field(pytree_node: bool = ..., *, default: Any = ..., **kwargs: Any) -> Any: ...
@overload
@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def dataclass(clz: type[_T], **kwargs: Any) -> type[_T]: ...
@overload
@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def dataclass(**kwargs: Any) -> Callable[[type[_T]], type[_T]]: ...
