//! Two-dimensional rotary embedding.

use mp_train::backend::{AttentionLayout, Backend};

use crate::buffer::{Act, Buf};
use crate::check::Check;
use crate::layouts::{describe, place, side_by_side};
use crate::numbers::{Exact, Numbers, dot};

pub fn cases<B: Backend>(b: &B, check: &mut Check) {
    let mut numbers = Numbers::new(5);
    for dim in [16, 48, 80, 128] {
        for rows in [1, 3, 65, 97] {
            let layouts = [
                AttentionLayout::grouped_per_head(3, dim),
                side_by_side(6, 2, dim),
            ];
            for layout in layouts {
                for inverse in [false, true] {
                    rotate(b, check, &mut numbers, &layout, rows, inverse);
                }
            }
        }
    }
}

/// Everything but x.
struct Rotation<'a> {
    cos: Vec<f64>,
    sin: Vec<f64>,
    positions: [Vec<u32>; 2],
    layout: &'a AttentionLayout,
    rows: usize,
    inverse: bool,
}

/// The exact rotation of each element of x, or `None` where x is not touched.
fn rotated(x: &[f64], rotation: &Rotation) -> Vec<Option<Exact>> {
    let layout = rotation.layout;
    let quarter = layout.head_dim / 4;
    let mut exact = vec![None; x.len()];
    for row in 0..rotation.rows {
        let parts = [(layout.query, layout.heads), (layout.key, layout.kv_heads)];
        for (part, heads) in parts {
            for head in 0..heads {
                for half in 0..2 {
                    let position = rotation.positions[half][row] as usize;
                    for j in 0..quarter {
                        let low = place(part, row, head, half * 2 * quarter + j);
                        let high = low + quarter;
                        let cos = rotation.cos[position * quarter + j];
                        let sin = rotation.sin[position * quarter + j];
                        let sin = if rotation.inverse { -sin } else { sin };
                        exact[low] = Some(Exact::sum([x[low] * cos, -x[high] * sin]));
                        exact[high] = Some(Exact::sum([x[high] * cos, x[low] * sin]));
                    }
                }
            }
        }
    }
    exact
}

fn rotate<B: Backend>(
    b: &B,
    check: &mut Check,
    numbers: &mut Numbers,
    layout: &AttentionLayout,
    rows: usize,
    inverse: bool,
) {
    const POSITIONS: usize = 131;
    let angles = numbers.around(0.0, 6.3, POSITIONS * layout.head_dim / 4);
    let cos = Buf::<B, f32>::of(b, &angles.iter().map(|a| a.cos()).collect::<Vec<_>>());
    let sin = Buf::<B, f32>::of(b, &angles.iter().map(|a| a.sin()).collect::<Vec<_>>());
    let positions = [(); 2].map(|()| numbers.ids(POSITIONS, rows));
    let position = Buf::<B, u32>::host(b, &positions[0]);
    let block_position = Buf::<B, u32>::host(b, &positions[1]);
    let rotation = Rotation {
        cos: cos.values(),
        sin: sin.values(),
        positions,
        layout,
        rows,
        inverse,
    };
    let apply = |b: &B, x: &mut Act<B>, inverse: bool| {
        b.rotary(
            &mut x.device,
            &cos.device,
            &sin.device,
            &position.device,
            &block_position.device,
            layout,
            rows,
            inverse,
        )
    };

    let mut x = Act::<B>::target(b, &numbers.values(rows * layout.query.row));
    let before = x.values();
    let label = format!("rows {rows}, {}, inverse {inverse}", describe(layout));
    let inputs: [&dyn crate::buffer::Input<B>; 4] = [&cos, &sin, &position, &block_position];
    check.run(b, "rotary", label.clone(), &inputs, || {
        apply(b, &mut x, inverse)
    });
    check.expect(b, &x, || {
        let exact = rotated(&before, &rotation).into_iter();
        exact.map(|x| x.unwrap_or(Exact::UNTOUCHED)).collect()
    });

    if rows * layout.query.row > 4000 {
        return;
    }
    // The gradient of the forward rotation is the inverse one, and the other way round; where
    // nothing is rotated a gradient passes unchanged.
    let mut dout = Act::<B>::target(b, &numbers.values(rows * layout.query.row));
    let c = dout.values();
    apply(b, &mut dout, !inverse).unwrap();
    let gradient = dout.result(b);
    let functional = |p: &[Vec<f64>]| {
        let exact = rotated(&p[0], &rotation).into_iter().zip(&p[0]);
        let out: Vec<f64> = exact.map(|(y, x)| y.map_or(*x, |y| y.value)).collect();
        dot(&c, &out)
    };
    let own = |b: &B, p: &[Vec<f64>]| {
        let mut x = Act::<B>::target(b, &p[0]);
        apply(b, &mut x, inverse).unwrap();
        dot(&c, &x.result(b))
    };
    check.gradient(
        b,
        "rotary",
        label,
        &[&before],
        &[&gradient],
        functional,
        own,
    );
}
