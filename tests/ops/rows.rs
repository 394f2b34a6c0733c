//! Rows moved by index, and columns of rows.

use mp_train::backend::{AttentionLayout, Backend};

use crate::buffer::{Act, Buf};
use crate::check::Check;
use crate::layouts::{describe, place, side_by_side};
use crate::numbers::{Exact, Numbers, dot};

const SIZES: [usize; 4] = [1, 3, 65, 97];

pub fn cases<B: Backend>(b: &B, check: &mut Check) {
    let mut numbers = Numbers::new(2);
    for rows in SIZES {
        for cols in SIZES {
            embed(b, check, &mut numbers, rows, cols);
            pick(b, check, &mut numbers, rows, cols);
        }
    }
    // Rows of whole 16-byte pieces; more than one piece of work for the threads; many rows, among
    // which every id comes back often.
    for (rows, cols) in [(3, 64), (97, 68), (97, 521), (2, 5_000), (700, 24)] {
        embed(b, check, &mut numbers, rows, cols);
        pick(b, check, &mut numbers, rows, cols);
    }
    for rows in SIZES {
        // Width of a row, first column, columns: all of them, the first, the last, some; on and off
        // 16-byte borders, and off them by one of the three alone; more than a block's threads take.
        for place in [
            (1, 0, 1),
            (3, 1, 2),
            (65, 0, 65),
            (97, 96, 1),
            (160, 65, 95),
            (64, 8, 24),
            (64, 4, 24),
            (68, 8, 24),
            (64, 8, 20),
            (3_000, 400, 2_584),
        ] {
            columns(b, check, &mut numbers, rows, place);
        }
    }
    columns(b, check, &mut numbers, 700, (4_608, 4_096, 256));
    for dim in [16, 48, 80, 128] {
        for rows in SIZES {
            let layouts = [
                AttentionLayout::grouped_per_head(3, dim),
                side_by_side(6, 2, dim),
                AttentionLayout::concatenated(4, 2, dim),
            ];
            for layout in layouts {
                store_key_value(b, check, &mut numbers, &layout, rows);
            }
        }
    }
}

fn embed<B: Backend>(b: &B, check: &mut Check, numbers: &mut Numbers, rows: usize, cols: usize) {
    const VOCAB: usize = 97;
    let table = Act::<B>::of(b, &numbers.values(VOCAB * cols));
    // At most half of the table, so that rows repeat and rows stay unused.
    let ids = numbers.ids(VOCAB / 2, rows);
    let ids_buf = Buf::<B, u32>::host(b, &ids);
    let mut out = Buf::<B, f32>::blank(b, rows * cols);
    let label = format!("rows {rows}, hidden {cols}");
    check.run(b, "embed", label.clone(), &[&table, &ids_buf], || {
        b.embed(&mut out.device, &table.device, &ids_buf.device, rows, cols)
    });
    let values = table.values();
    let lookup = |values: &[f64]| -> Vec<f64> {
        let rows = ids.iter().map(|&id| id as usize * cols);
        rows.flat_map(|start| values[start..start + cols].to_vec())
            .collect()
    };
    check.expect(b, &out, || {
        lookup(&values).into_iter().map(Exact::copy).collect()
    });

    let dout = Act::<B>::of(b, &numbers.values(rows * cols));
    let mut dtable = Buf::<B, f32>::target(b, &numbers.values(VOCAB * cols));
    let (before, gradient) = (dtable.values(), dout.values());
    let op = "embed_backward";
    check.run(b, op, label.clone(), &[&dout, &ids_buf], || {
        b.embed_backward(
            &mut dtable.device,
            &dout.device,
            &ids_buf.device,
            rows,
            cols,
        )
    });
    check.expect(b, &dtable, || {
        (0..VOCAB * cols)
            .map(|at| {
                let (id, col) = (at / cols, at % cols);
                let hits = (0..rows).filter(|&row| ids[row] as usize == id);
                let terms: Vec<f64> = hits.map(|row| gradient[row * cols + col]).collect();
                if terms.is_empty() {
                    return Exact::UNTOUCHED;
                }
                Exact::sum(terms.into_iter().chain([before[at]]))
            })
            .collect()
    });

    if rows * cols > 97 * 97 {
        return;
    }
    let mut dtable = Buf::<B, f32>::target(b, &vec![0.0; VOCAB * cols]);
    b.embed_backward(
        &mut dtable.device,
        &dout.device,
        &ids_buf.device,
        rows,
        cols,
    )
    .unwrap();
    let own = |b: &B, x: &[Vec<f64>]| {
        let table = Act::<B>::of(b, &x[0]);
        let mut out = Buf::<B, f32>::blank(b, rows * cols);
        b.embed(&mut out.device, &table.device, &ids_buf.device, rows, cols)
            .unwrap();
        dot(&gradient, &out.result(b))
    };
    let functional = |x: &[Vec<f64>]| dot(&gradient, &lookup(&x[0]));
    let result = dtable.result(b);
    check.gradient(b, op, label, &[&values], &[&result], functional, own);
}

fn pick<B: Backend>(b: &B, check: &mut Check, numbers: &mut Numbers, rows: usize, cols: usize) {
    let (all, first) = (rows + 40, 5);
    let label = format!("{rows} of {all} rows, cols {cols}");
    let x = Buf::<B, f32>::of(b, &numbers.values(all * cols));
    let index = numbers.ids(all, first + rows);
    let index_buf = Buf::<B, u32>::host(b, &index);
    let mut out = Buf::<B, f32>::blank(b, rows * cols);
    check.run(b, "gather_rows", label.clone(), &[&x, &index_buf], || {
        b.gather_rows(
            &mut out.device,
            &x.device,
            &index_buf.device,
            first,
            rows,
            cols,
        )
    });
    let values = x.values();
    check.expect(b, &out, || {
        let source = |row: usize, col: usize| values[index[first + row] as usize * cols + col];
        (0..rows * cols)
            .map(|at| Exact::copy(source(at / cols, at % cols)))
            .collect()
    });

    let x = Act::<B>::of(b, &numbers.values(rows * cols));
    let index = numbers.distinct(all, first + rows);
    let index_buf = Buf::<B, u32>::host(b, &index);
    let mut out = Act::<B>::blank(b, all * cols);
    check.run(b, "scatter_rows", label, &[&x, &index_buf], || {
        b.scatter_rows(
            &mut out.device,
            &x.device,
            &index_buf.device,
            first,
            rows,
            cols,
        )
    });
    let values = x.values();
    check.expect(b, &out, || {
        let mut exact = vec![Exact::UNTOUCHED; all * cols];
        for row in 0..rows {
            for col in 0..cols {
                let target = index[first + row] as usize * cols + col;
                exact[target] = Exact::copy(values[row * cols + col]);
            }
        }
        exact
    });
}

fn columns<B: Backend>(
    b: &B,
    check: &mut Check,
    numbers: &mut Numbers,
    rows: usize,
    (width, first, cols): (usize, usize, usize),
) {
    let label = format!("rows {rows}, columns {first} + {cols} of {width}");
    let narrow = Act::<B>::of(b, &numbers.values(rows * cols));
    let mut out = Act::<B>::blank(b, rows * width);
    check.run(b, "put_columns", label.clone(), &[&narrow], || {
        b.put_columns(&mut out.device, &narrow.device, rows, width, first, cols)
    });
    let put = |values: &[f64], beside: f64| -> Vec<f64> {
        let mut out = vec![beside; rows * width];
        for (out, x) in out.chunks_exact_mut(width).zip(values.chunks_exact(cols)) {
            out[first..first + cols].copy_from_slice(x);
        }
        out
    };
    let narrow_values = narrow.values();
    check.expect(b, &out, || {
        // Other columns stay as they are.
        let exact = put(&narrow_values, Exact::UNTOUCHED.value);
        exact.into_iter().map(Exact::copy).collect()
    });

    let wide = Act::<B>::of(b, &numbers.values(rows * width));
    let mut out = Act::<B>::blank(b, rows * cols);
    check.run(b, "take_columns", label.clone(), &[&wide], || {
        b.take_columns(&mut out.device, &wide.device, rows, width, first, cols)
    });
    let take = |values: &[f64]| -> Vec<f64> {
        let rows = values.chunks_exact(width);
        rows.flat_map(|row| row[first..first + cols].to_vec())
            .collect()
    };
    let wide_values = wide.values();
    check.expect(b, &out, || {
        take(&wide_values).into_iter().map(Exact::copy).collect()
    });

    if rows * width > 4_000 {
        return;
    }
    // Each is the gradient of the other.
    let taken = out.result(b);
    check.gradient(
        b,
        "put_columns",
        label.clone(),
        &[&narrow_values],
        &[&taken],
        |p| dot(&wide_values, &put(&p[0], 0.0)),
        |b, p| {
            let x = Act::<B>::of(b, &p[0]);
            let mut out = Act::<B>::target(b, &vec![0.0; rows * width]);
            b.put_columns(&mut out.device, &x.device, rows, width, first, cols)
                .unwrap();
            dot(&wide_values, &out.result(b))
        },
    );
    let mut gradient = Act::<B>::target(b, &vec![0.0; rows * width]);
    b.put_columns(
        &mut gradient.device,
        &narrow.device,
        rows,
        width,
        first,
        cols,
    )
    .unwrap();
    check.gradient(
        b,
        "take_columns",
        label,
        &[&wide_values],
        &[&gradient.result(b)],
        |p| dot(&narrow_values, &take(&p[0])),
        |b, p| {
            let x = Act::<B>::of(b, &p[0]);
            let mut out = Act::<B>::blank(b, rows * cols);
            b.take_columns(&mut out.device, &x.device, rows, width, first, cols)
                .unwrap();
            dot(&narrow_values, &out.result(b))
        },
    );
}

fn store_key_value<B: Backend>(
    b: &B,
    check: &mut Check,
    numbers: &mut Numbers,
    layout: &AttentionLayout,
    rows: usize,
) {
    let x = Act::<B>::of(b, &numbers.values(rows * layout.query.row));
    let slots_in_cache = rows + 9;
    let slots = numbers.distinct(slots_in_cache, rows);
    let slots_buf = Buf::<B, u32>::host(b, &slots);
    let (dim, kv_heads) = (layout.head_dim, layout.kv_heads);
    let mut cache = Act::<B>::blank(b, slots_in_cache * 2 * kv_heads * dim);
    let label = format!("rows {rows}, {}", describe(layout));
    check.run(b, "store_key_value", label, &[&x, &slots_buf], || {
        b.store_key_value(
            &mut cache.device,
            &x.device,
            &slots_buf.device,
            layout,
            rows,
        )
    });
    let values = x.values();
    check.expect(b, &cache, || {
        let mut exact = vec![Exact::UNTOUCHED; slots_in_cache * 2 * kv_heads * dim];
        for (row, &slot) in slots.iter().enumerate() {
            for (which, part) in [layout.key, layout.value].into_iter().enumerate() {
                for head in 0..kv_heads {
                    for d in 0..dim {
                        let target = ((slot as usize * 2 + which) * kv_heads + head) * dim + d;
                        exact[target] = Exact::copy(values[place(part, row, head, d)]);
                    }
                }
            }
        }
        exact
    });
}
