//! Rotary embedding, of both kinds.

use mp_train::backend::{AttentionLayout, Backend, RotaryPositions};

use crate::buffer::{Act, Buf};
use crate::check::Check;
use crate::layouts::{describe, place, side_by_side};
use crate::numbers::{Exact, Numbers, dot};

/// Which elements of a head are turned together.
#[derive(Clone, Copy, Debug)]
enum Kind {
    TwoDimensional,
    /// The first so many elements, neighbours together.
    Interleaved(usize),
}

pub fn cases<B: Backend>(b: &B, check: &mut Check) {
    let mut numbers = Numbers::new(5);
    for dim in [16, 48, 80, 128] {
        for rows in [1, 3, 65, 97] {
            let layouts = [
                AttentionLayout::grouped_per_head(3, dim),
                side_by_side(6, 2, dim),
                AttentionLayout::concatenated(4, 2, dim),
            ];
            for layout in layouts {
                for kind in [Kind::TwoDimensional, Kind::Interleaved(dim / 2)] {
                    rotate(b, check, &mut numbers, &layout, rows, kind);
                }
            }
        }
    }
    // Nothing left alone, next to everything, an odd number of pairs; heads off 16-byte borders.
    for (dim, width) in [(2, 2), (65, 2), (97, 96), (24, 24), (24, 22), (40, 8)] {
        for rows in [1, 3, 65, 97] {
            let layout = AttentionLayout::concatenated(3, 1, dim);
            let kind = Kind::Interleaved(width);
            rotate(b, check, &mut numbers, &layout, rows, kind);
        }
    }
    // The heads of ChatGLM2-6B; many rows.
    let layout = AttentionLayout::concatenated(32, 2, 128);
    rotate(b, check, &mut numbers, &layout, 130, Kind::Interleaved(64));
}

/// Everything but x.
struct Rotation<'a> {
    cos: Vec<f64>,
    sin: Vec<f64>,
    positions: [Vec<u32>; 2],
    kind: Kind,
    layout: &'a AttentionLayout,
    rows: usize,
}

impl Rotation<'_> {
    /// Angles of a position in the tables.
    fn angles(&self) -> usize {
        match self.kind {
            Kind::TwoDimensional => self.layout.head_dim / 4,
            Kind::Interleaved(width) => width / 2,
        }
    }

    /// Places of the elements of each pair in a head, and which angle of which positions is theirs.
    fn pairs(&self) -> Vec<(usize, usize, usize, usize)> {
        let angles = self.angles();
        match self.kind {
            Kind::TwoDimensional => (0..2 * angles)
                .map(|at| {
                    let (half, j) = (at / angles, at % angles);
                    let low = half * 2 * angles + j;
                    (low, low + angles, half, j)
                })
                .collect(),
            Kind::Interleaved(_) => (0..angles).map(|j| (2 * j, 2 * j + 1, 0, j)).collect(),
        }
    }
}

/// The exact rotation of each element of x, or `None` where x is not touched.
fn rotated(x: &[f64], rotation: &Rotation, inverse: bool) -> Vec<Option<Exact>> {
    let layout = rotation.layout;
    let pairs = rotation.pairs();
    let mut exact = vec![None; x.len()];
    for row in 0..rotation.rows {
        let parts = [(layout.query, layout.heads), (layout.key, layout.kv_heads)];
        for (part, heads) in parts {
            for head in 0..heads {
                for &(first, second, which, j) in &pairs {
                    let angle = rotation.positions[which][row] as usize * rotation.angles() + j;
                    let (cos, sin) = (rotation.cos[angle], rotation.sin[angle]);
                    let sin = if inverse { -sin } else { sin };
                    let [a, b] = [first, second].map(|index| place(part, row, head, index));
                    exact[a] = Some(Exact::sum([x[a] * cos, -x[b] * sin]));
                    exact[b] = Some(Exact::sum([x[b] * cos, x[a] * sin]));
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
    kind: Kind,
) {
    const POSITIONS: usize = 131;
    let positions = [(); 2].map(|()| numbers.ids(POSITIONS, rows));
    let mut rotation = Rotation {
        cos: Vec::new(),
        sin: Vec::new(),
        positions,
        kind,
        layout,
        rows,
    };
    let angles = numbers.around(0.0, 6.3, POSITIONS * rotation.angles());
    let cos = Buf::<B, f32>::of(b, &angles.iter().map(|a| a.cos()).collect::<Vec<_>>());
    let sin = Buf::<B, f32>::of(b, &angles.iter().map(|a| a.sin()).collect::<Vec<_>>());
    (rotation.cos, rotation.sin) = (cos.values(), sin.values());
    let position = Buf::<B, u32>::host(b, &rotation.positions[0]);
    let block_position = Buf::<B, u32>::host(b, &rotation.positions[1]);
    let apply = |b: &B, x: &mut Act<B>, inverse: bool| {
        let positions: RotaryPositions<'_, B> = match kind {
            Kind::TwoDimensional => RotaryPositions::TwoDimensional {
                position: &position.device,
                block_position: &block_position.device,
            },
            Kind::Interleaved(width) => RotaryPositions::Interleaved {
                position: &position.device,
                width,
            },
        };
        let (cos, sin) = (&cos.device, &sin.device);
        b.rotary(&mut x.device, cos, sin, positions, layout, rows, inverse)
    };

    for inverse in [false, true] {
        let mut x = Act::<B>::target(b, &numbers.values(rows * layout.query.row));
        let before = x.values();
        let label = format!(
            "{kind:?}, rows {rows}, {}, inverse {inverse}",
            describe(layout)
        );
        let inputs: [&dyn crate::buffer::Input<B>; 4] = [&cos, &sin, &position, &block_position];
        check.run(b, "rotary", label.clone(), &inputs, || {
            apply(b, &mut x, inverse)
        });
        check.expect(b, &x, || {
            let exact = rotated(&before, &rotation, inverse).into_iter();
            exact.map(|x| x.unwrap_or(Exact::UNTOUCHED)).collect()
        });

        if rows * layout.query.row > 4000 {
            continue;
        }
        // The gradient of the forward rotation is the inverse one, and the other way round; where
        // nothing is rotated a gradient passes unchanged.
        let mut dout = Act::<B>::target(b, &numbers.values(rows * layout.query.row));
        let c = dout.values();
        apply(b, &mut dout, !inverse).unwrap();
        let gradient = dout.result(b);
        let functional = |p: &[Vec<f64>]| {
            let exact = rotated(&p[0], &rotation, inverse).into_iter().zip(&p[0]);
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
}
