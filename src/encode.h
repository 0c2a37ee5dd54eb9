/*
 * encode.h
 *		Tuple -> JSON, as row_to_json() writes it: see encode.c.
 */
#ifndef SM_ENCODE_H
#define SM_ENCODE_H

#include "access/attnum.h"
#include "access/tupdesc.h"
#include "executor/tuptable.h"
#include "lib/stringinfo.h"

/*
 * What is known of one table's columns.
 *
 * The owner makes a new encoder when the table's relcache entry is invalidated.
 * Changes of pg_cast, which decides how a column of an extension's type is
 * written, the encoder notices by itself.
 */
typedef struct SmEncoder SmEncoder;

/*
 * Make an encoder for tuples of this descriptor, which is not kept.  Everything
 * lives in cxt; an ERROR leaves an unfinished encoder there.
 */
extern SmEncoder *sm_encode_create(TupleDesc desc, MemoryContext cxt);

/*
 * Between these two the functions below write what row_to_json() writes, byte for
 * byte, under these settings, whatever the session's are:
 *
 *		DateStyle = ISO, IntervalStyle = postgres, TimeZone = GMT,
 *		bytea_output = hex, extra_float_digits = 1, quote_all_identifiers = off;
 *		lc_monetary as the session found it, since the meaning of an amount of
 *		money depends on it (the yen has no cents); and, in a table with a column
 *		of a reg* type, search_path = pg_catalog, pg_temp.
 *
 * Only those are changed in which the session differs and on which the text of the
 * table's types depends: text, numeric, timestamptz, jsonb and the like need none.
 * Outside, the session's settings hold, but for timestamptz columns: they are
 * always written in UTC.
 *
 * The result of the first is the argument of the second.  An ERROR between them
 * needs no care.
 */
extern int	sm_encode_begin_settings(const SmEncoder *enc);
extern void sm_encode_end_settings(int nest);

/*
 * All below append to out, and leave other garbage in the current memory context,
 * which should be reset after each tuple.
 */

/* The whole row as a JSON object. */
extern void sm_encode_row(SmEncoder *enc, TupleTableSlot *slot, StringInfo out);

/*
 * A JSON object with the old value of each column that differs.  Returns how
 * many.  Images are compared, not meanings: 1.0 and 1.00 differ, as do two
 * spellings of the same citext.
 */
extern int	sm_encode_changed(SmEncoder *enc, TupleTableSlot *oldslot,
							  TupleTableSlot *newslot, StringInfo out);

/* Is a column the same in two rows, in the sense of the above? */
extern bool sm_encode_same(SmEncoder *enc, TupleTableSlot *a, TupleTableSlot *b, AttrNumber attnum);

/*
 * One column as text: what row_to_json(row) ->> column gives, so that an entity's
 * id is the text that its data shows (true, 2026-01-31T09:00:00+00:00).  A json
 * column comes as it is.  False, and nothing appended, for a null.
 */
extern bool sm_encode_text(SmEncoder *enc, TupleTableSlot *slot, AttrNumber attnum,
						   StringInfo out);

/* One column as a JSON value.  False, and "null" appended, for a null. */
extern bool sm_encode_value(SmEncoder *enc, TupleTableSlot *slot, AttrNumber attnum,
							StringInfo out);

#endif							/* SM_ENCODE_H */
