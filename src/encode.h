/*
 * encode.h
 *		Rows as JSON, byte for byte as row_to_json() writes them: see encode.c.
 */
#ifndef SM_ENCODE_H
#define SM_ENCODE_H

#include "executor/tuptable.h"
#include "lib/stringinfo.h"

typedef struct SmEncoder SmEncoder;

/* What is known of a row type's columns; lives in cxt. */
extern SmEncoder *sm_encode_create(TupleDesc desc, MemoryContext cxt);

/*
 * Between the two, text does not depend on the session's settings.  Returns what
 * the end needs.
 */
extern int	sm_encode_begin_settings(const SmEncoder *encoder);
extern void sm_encode_end_settings(int nest);

/* {"column":value,...} with all columns that are not dropped. */
extern void sm_encode_row(SmEncoder *encoder, TupleTableSlot *slot, StringInfo out);

/* The old values of the columns that differ; returns how many. */
extern int	sm_encode_changed(SmEncoder *encoder, TupleTableSlot *oldslot, TupleTableSlot *newslot,
							  StringInfo out);

/* One column, as JSON and as plain text (which must not be null). */
extern void sm_encode_value(SmEncoder *encoder, TupleTableSlot *slot, AttrNumber attnum, StringInfo out);
extern void sm_encode_text(SmEncoder *encoder, TupleTableSlot *slot, AttrNumber attnum, StringInfo out);

#endif							/* SM_ENCODE_H */
