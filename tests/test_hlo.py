"""Cost of HLO text: loops weigh by their trips, collectives count once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.hlo import Collective, Cost, program_cost

CYCLES = 'backend_config={"window_config":{"estimated_cycles":"100"}}'
# As libtpu writes loops: no trip count, a counter, a bound in the condition.
LOOP = """\
HloModule jit_step, is_scheduled=true

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[]{:T(256)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(256)} get-tuple-element(%p), index=0
  %x = f32[4,8]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %one = s32[]{:T(256)} constant(STRIDE)
  %next = s32[]{:T(256)} add(%i, %one), metadata={op_name="jit(step)/while/body=x"}
  %y = f32[4,8]{1,0:T(8,128)} fusion(%x), kind=kLoop, CYCLES
  ROOT %t = (s32[]{:T(256)}, f32[4,8]{1,0:T(8,128)}) tuple(%next, %y)
}

%condition (q: (s32[], f32[4,8])) -> pred[] {
  %bound = s32[]{:T(256)} constant(12)
  %q = (s32[]{:T(256)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %j = s32[]{:T(256)} get-tuple-element(%q), index=0
  ROOT %less = pred[]{:T(1024)} compare(%j, %bound), direction=LT
}

ENTRY %main (a: f32[4,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(256)} constant(START)
  %start = s32[]{:T(256)} copy(%zero)
  %b = f32[4,8]{1,0:T(8,128)} fusion(%a), kind=kLoop, CYCLES
  %state = (s32[]{:T(256)}, f32[4,8]{1,0:T(8,128)}) tuple(%start, %b)
  %w = (s32[], f32[4,8]) while(%state), condition=%condition, body=%body
  ROOT %out = f32[4,8]{1,0:T(8,128)} get-tuple-element(%w), index=1
}
"""


def loop(start: int = 0, stride: int = 1) -> str:
    text = LOOP.replace("START", str(start)).replace("STRIDE", str(stride))
    return text.replace("CYCLES", CYCLES)


def entry(*lines: str) -> str:
    inside = "\n".join(f"  {line}" for line in lines)
    return f"ENTRY %main (a: f32[4,8]) -> f32[4,8] {{\n{inside}\n}}\n"


@pytest.mark.parametrize(
    "start, stride, trips", [(0, 1, 12), (1, 1, 11), (0, 2, 6), (0, 5, 3)]
)
def test_a_loop_counts_as_often_as_it_runs(start, stride, trips):
    assert program_cost(loop(start, stride)) == Cost(100 + trips * 100, {})


def test_a_loop_without_end_in_sight_is_refused():
    with pytest.raises(ValueError, match="loop w does not show"):
        program_cost(loop().replace("direction=LT", "direction=NE"))


def test_a_start_and_its_done_are_one():
    text = entry(
        "%a = f32[4,8]{1,0} parameter(0)",
        "%s = (f32[4,8]{1,0}, f32[32,8]{1,0}) all-gather-start(%a), dimensions={0}",
        "%d = f32[32,8]{1,0} all-gather-done(%s)",
        "%g = f32[32,8]{1,0} all-gather(%a), dimensions={0}",
        "%p = (f32[4,8], f32[4,8], u32[], u32[]) collective-permute-start(%a)",
        "%q = f32[4,8]{1,0} collective-permute-done(%p)",
        "ROOT %r = bf16[4,8]{1,0} convert(%q)",
    )
    assert program_cost(text).collectives == {
        "all-gather": Collective(2, 2 * 32 * 8 * 4),
        "collective-permute": Collective(1, 4 * 8 * 4),
    }


def test_a_wrapped_collective_counts_at_its_start_only():
    text = (
        "%wrapped (i: f32[4,8]) -> f32[4,8] {\n"
        "  %i = f32[4,8]{1,0} parameter(0)\n"
        "  ROOT %t = f32[4,8]{1,0} all-to-all(%i), dimensions={0}\n}\n"
    ) + entry(
        "%a = f32[4,8]{1,0} parameter(0)",
        "%s = ((f32[4,8]), f32[4,8], s32[]) async-start(%a), calls=%wrapped",
        "ROOT %d = f32[4,8]{1,0} async-done(%s), calls=%wrapped",
    )
    assert program_cost(text).collectives == {"all-to-all": Collective(1, 128)}


def test_several_arrays_in_one_all_reduce_are_one():
    text = entry(
        "%a = f32[4,8]{1,0} parameter(0)",
        "%b = bf16[2]{0:T(1024)(2,1)} parameter(1)",
        "%c = pred[] parameter(2)",
        "ROOT %s = (f32[4,8]{1,0}, /*index=1*/bf16[2]{0:T(1024)(2,1)}, pred[]) "
        "all-reduce(%a, /*index=1*/%b, %c), to_apply=%add",
    )
    found = program_cost(text).collectives
    assert found == {"all-reduce": Collective(1, 128 + 4 + 1)}


def test_an_all_reduce_fused_with_a_slice_scatters():
    text = (
        "%all-reduce-scatter.1 (i: f32[32,8]) -> f32[4,8] {\n"
        "  %i = f32[32,8]{1,0} parameter(0)\n"
        "  %s = f32[32,8]{1,0} all-reduce(%i), to_apply=%add\n"
        "  ROOT %p = f32[4,8]{1,0} dynamic-slice(%s)\n}\n"
    ) + entry(
        "%a = f32[32,8]{1,0} parameter(0)",
        "ROOT %f = f32[4,8] fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1",
    )
    assert program_cost(text).collectives == {"reduce-scatter": Collective(1, 1024)}


def mesh_of(n: int) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.devices()[:n]), ("x",))


def test_a_gradient_of_copies_is_reduced_once_per_iteration():
    mesh = mesh_of(4)

    def step(w, batches):
        def add(total, x):
            grad = jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w)))(total)
            return total + jax.lax.with_sharding_constraint(
                grad, NamedSharding(mesh, P())
            ), None

        return jax.lax.scan(add, w, batches)[0]

    where = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, "x"))
    w = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=where[0])
    x = jax.ShapeDtypeStruct((5, 8, 16), jnp.float32, sharding=where[1])
    text = jax.jit(step).lower(w, x).compile().as_text()
    assert program_cost(text).collectives == {"all-reduce": Collective(5, 5 * 512)}


def test_gathered_rows_are_counted_by_the_result():
    mesh = mesh_of(8)
    parted, whole = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())
    x = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=parted)
    text = jax.jit(lambda x: x * 2, out_shardings=whole).lower(x).compile().as_text()
    assert program_cost(text).collectives == {"all-gather": Collective(1, 512)}


def test_one_device_has_no_collective():
    text = jax.jit(lambda x: x @ x).lower(jnp.ones((4, 4))).compile().as_text()
    assert program_cost(text).collectives == {}


def test_a_kernel_costs_what_is_stated_as_often_as_it_runs():
    text = loop().replace(
        "%y = f32[4,8]{1,0:T(8,128)} fusion(%x), kind=kLoop, " + CYCLES,
        "%jvp_flash_forward_.3 = f32[4,8]{1,0} custom-call(%x)",
    )
    text = text.replace("(%next, %y)", "(%next, %jvp_flash_forward_.3)")
    kernels = {"flash_forward": 7, "flash_backward": 1000}
    assert program_cost(text) == Cost(100, {})
    assert program_cost(text, kernels) == Cost(100 + 12 * 7, {}, 12 * 7)
