/*
 * encode.c
 *		Tuple -> JSON, as row_to_json() writes it.
 *
 * Called by the capture trigger, in the selling transaction, once or twice for
 * each changed row.  What costs a catalog look-up is decided once per table, in
 * sm_encode_create(): the text of each key, how each column is written, and which
 * settings its type's output depends on.  A row then costs no look-up, but for
 * arrays, composites and types with a cast to json, which go to core's own
 * functions.  No locks are taken and no table is read, except TOAST.
 *
 * The same row must give the same bytes whoever changes it: the two ends compare
 * digests of them, and entities are recognised by their keys.  So the settings
 * that matter to a table's types are fixed while its rows are encoded, between
 * sm_encode_begin_settings() and its end.
 */
#include "postgres.h"

#include "access/transam.h"
#include "catalog/namespace.h"
#include "catalog/pg_type.h"
#include "common/jsonapi.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "parser/parse_coerce.h"
#include "pgtime.h"
#include "utils/builtins.h"
#include "utils/bytea.h"
#include "utils/datetime.h"
#include "utils/datum.h"
#include "utils/float.h"
#include "utils/guc.h"
#include "utils/inval.h"
#include "utils/json.h"
#include "utils/jsonb.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/syscache.h"
#include "utils/typcache.h"

#include "encode.h"

/* How a column is written. */
typedef enum SmKind
{
	SM_KIND_BOOL,
	SM_KIND_INT2,
	SM_KIND_INT4,
	SM_KIND_INT8,
	SM_KIND_NUMBER,				/* output function; quoted when no JSON number (NaN) */
	SM_KIND_TEXT,				/* the varlena's bytes, escaped */
	SM_KIND_JSON,				/* the varlena's bytes */
	SM_KIND_JSONB,
	SM_KIND_DATETIME,			/* date and timestamps, ISO 8601 */
	SM_KIND_ARRAY,
	SM_KIND_COMPOSITE,
	SM_KIND_CAST,				/* an extension's type that has a cast to json */
	SM_KIND_OTHER				/* output function, escaped */
} SmKind;

/* Settings that output functions heed. */
#define SM_HEEDS_DATESTYLE		0x01
#define SM_HEEDS_INTERVALSTYLE	0x02
#define SM_HEEDS_TIMEZONE		0x04
#define SM_HEEDS_BYTEA			0x08
#define SM_HEEDS_FLOAT_DIGITS	0x10
#define SM_HEEDS_MONETARY		0x20
#define SM_HEEDS_QUOTING		0x40
#define SM_HEEDS_SEARCH_PATH	0x80

/*
 * What to assume of code that we do not know.  Not search_path: a cast written
 * in SQL may need the application's own to find its functions, and a sale must
 * not fail for being captured.
 */
#define SM_HEEDS_UNKNOWN		(0xff & ~SM_HEEDS_SEARCH_PATH)

typedef struct SmColumn
{
	char	   *key;			/* with the comma before: ,"name": */
	int			keylen;
	bool		dropped;
	bool		typbyval;
	int16		typlen;
	Oid			type;			/* as declared */
	Oid			basetype;		/* below any domains */
	SmKind		kind;
	Oid			castfunc;		/* of SM_KIND_CAST */
	FmgrInfo	output;			/* of SM_KIND_NUMBER and SM_KIND_OTHER */
} SmColumn;

struct SmEncoder
{
	MemoryContext cxt;
	uint64		casts_seen;		/* cast_changes when the columns were resolved */
	int			heeds;			/* SM_HEEDS_*, of all columns */
	int			natts;
	SmColumn	columns[FLEXIBLE_ARRAY_MEMBER];
};

/* Counts the invalidations of pg_cast in this backend. */
static uint64 cast_changes = 0;

static void
count_cast_change(Datum arg, int cacheid, uint32 hashvalue)
{
	cast_changes++;
}

/*
 * Decide how a column is written: the categories of core's json.c, and a few of
 * our own where the output function would only cost a copy.
 */
static void
resolve_column(SmColumn *col, MemoryContext cxt)
{
	Oid			outfunc;
	bool		isvarlena;

	col->basetype = getBaseType(col->type);
	col->castfunc = InvalidOid;

	switch (col->basetype)
	{
		case BOOLOID:
			col->kind = SM_KIND_BOOL;
			return;
		case INT2OID:
			col->kind = SM_KIND_INT2;
			return;
		case INT4OID:
			col->kind = SM_KIND_INT4;
			return;
		case INT8OID:
			col->kind = SM_KIND_INT8;
			return;
		case FLOAT4OID:
		case FLOAT8OID:
		case NUMERICOID:
			col->kind = SM_KIND_NUMBER;
			break;
		case TEXTOID:
		case VARCHAROID:
		case BPCHAROID:
			col->kind = SM_KIND_TEXT;
			return;
		case JSONOID:
			col->kind = SM_KIND_JSON;
			return;
		case JSONBOID:
			col->kind = SM_KIND_JSONB;
			return;
		case DATEOID:
		case TIMESTAMPOID:
		case TIMESTAMPTZOID:
			col->kind = SM_KIND_DATETIME;
			return;
		default:
			col->kind = SM_KIND_OTHER;
			if (OidIsValid(get_element_type(col->basetype)) ||
				col->basetype == ANYARRAYOID)	/* pg_statistic has such columns */
			{
				col->kind = SM_KIND_ARRAY;
				return;
			}
			if (type_is_rowtype(col->basetype))
			{
				col->kind = SM_KIND_COMPOSITE;
				return;
			}
			/* of built-in types, core leaves the casts to json aside */
			if (col->basetype >= FirstNormalObjectId &&
				find_coercion_pathway(JSONOID, col->basetype, COERCION_EXPLICIT,
									  &col->castfunc) == COERCION_PATH_FUNC &&
				OidIsValid(col->castfunc))
			{
				col->kind = SM_KIND_CAST;
				return;
			}
			break;
	}

	getTypeOutputInfo(col->basetype, &outfunc, &isvarlena);
	fmgr_info_cxt(outfunc, &col->output, cxt);
}

/*
 * Which settings the text of this type's values depends on.  Built-in types that
 * are not known here are treated like foreign ones: slower, never wrong.
 */
static int
settings_of_type(Oid type)
{
	Oid			inner;
	int			heeds = SM_HEEDS_UNKNOWN;

	check_stack_depth();
	type = getBaseType(type);

	switch (type)
	{
		case BOOLOID:
		case INT2OID:
		case INT4OID:
		case INT8OID:
		case NUMERICOID:
		case OIDOID:
		case CHAROID:
		case NAMEOID:
		case TEXTOID:
		case VARCHAROID:
		case BPCHAROID:
		case BITOID:
		case VARBITOID:
		case UUIDOID:
		case JSONOID:
		case JSONBOID:
		case TIMEOID:
		case TIMETZOID:
		case INETOID:
		case CIDROID:
		case MACADDROID:
		case TSVECTOROID:
			return 0;
		case DATEOID:
		case TIMESTAMPOID:
			return SM_HEEDS_DATESTYLE;
		case TIMESTAMPTZOID:
			return SM_HEEDS_DATESTYLE | SM_HEEDS_TIMEZONE;
		case INTERVALOID:
			return SM_HEEDS_INTERVALSTYLE;
		case BYTEAOID:
			return SM_HEEDS_BYTEA;
		case CASHOID:
			return SM_HEEDS_MONETARY;
		case FLOAT4OID:
		case FLOAT8OID:
			return SM_HEEDS_FLOAT_DIGITS;
		case REGCLASSOID:
		case REGCOLLATIONOID:
		case REGCONFIGOID:
		case REGDICTIONARYOID:
		case REGNAMESPACEOID:
		case REGOPEROID:
		case REGOPERATOROID:
		case REGPROCOID:
		case REGPROCEDUREOID:
		case REGROLEOID:
		case REGTYPEOID:
			return SM_HEEDS_SEARCH_PATH | SM_HEEDS_QUOTING;
		default:
			break;
	}

	inner = get_element_type(type);
	if (OidIsValid(inner))
		return settings_of_type(inner);

	switch (get_typtype(type))
	{
		case TYPTYPE_ENUM:
			return 0;
		case TYPTYPE_RANGE:
			return settings_of_type(get_range_subtype(type));
		case TYPTYPE_MULTIRANGE:
			return settings_of_type(get_multirange_range(type));
		case TYPTYPE_COMPOSITE:
			{
				/* ALTER TYPE may add attributes unseen: hence not only theirs */
				TupleDesc	desc = lookup_rowtype_tupdesc_copy(type, -1);

				for (int i = 0; i < desc->natts; i++)
				{
					if (!TupleDescAttr(desc, i)->attisdropped)
						heeds |= settings_of_type(TupleDescAttr(desc, i)->atttypid);
				}
				FreeTupleDesc(desc);
				return heeds;
			}
		default:
			return heeds;
	}
}

SmEncoder *
sm_encode_create(TupleDesc desc, MemoryContext cxt)
{
	static bool listening = false;
	SmEncoder  *enc;
	StringInfoData key;

	if (!listening)
	{
		CacheRegisterSyscacheCallback(CASTSOURCETARGET, count_cast_change, (Datum) 0);
		listening = true;
	}

	enc = MemoryContextAllocZero(cxt, offsetof(SmEncoder, columns) +
								 desc->natts * sizeof(SmColumn));
	enc->cxt = cxt;
	enc->natts = desc->natts;
	enc->casts_seen = cast_changes;
	initStringInfo(&key);

	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, i);
		SmColumn   *col = &enc->columns[i];

		col->dropped = att->attisdropped;
		if (col->dropped)
			continue;

		resetStringInfo(&key);
		appendStringInfoChar(&key, ',');
		escape_json(&key, NameStr(att->attname));
		appendStringInfoChar(&key, ':');
		col->key = MemoryContextStrdup(cxt, key.data);
		col->keylen = key.len;

		col->type = att->atttypid;
		col->typlen = att->attlen;
		col->typbyval = att->attbyval;
		resolve_column(col, cxt);

		/* date and time are written without their output functions, in UTC */
		if (col->kind != SM_KIND_DATETIME)
			enc->heeds |= settings_of_type(col->type);
	}
	pfree(key.data);

	return enc;
}

static void
fix_setting(int *nest, const char *name, const char *value)
{
	if (*nest == 0)
		*nest = NewGUCNestLevel();
	(void) set_config_option(name, value, PGC_USERSET, PGC_S_SESSION, GUC_ACTION_SAVE,
							 true, 0, false);
}

/* Returns 0 where the session's settings will do, which is the common case. */
int
sm_encode_begin_settings(const SmEncoder *enc)
{
	int			heeds = enc->heeds;
	int			nest = 0;

	if ((heeds & SM_HEEDS_DATESTYLE) && DateStyle != USE_ISO_DATES)
		fix_setting(&nest, "DateStyle", "ISO");
	if ((heeds & SM_HEEDS_INTERVALSTYLE) && IntervalStyle != INTSTYLE_POSTGRES)
		fix_setting(&nest, "IntervalStyle", "postgres");
	if (heeds & SM_HEEDS_TIMEZONE)
	{
		const char *zone = pg_get_timezone_name(session_timezone);

		if (strcmp(zone, "GMT") != 0 && strcmp(zone, "UTC") != 0 &&
			strcmp(zone, "Etc/UTC") != 0)
			fix_setting(&nest, "TimeZone", "GMT");
	}

	if ((heeds & SM_HEEDS_BYTEA) && bytea_output != BYTEA_OUTPUT_HEX)
		fix_setting(&nest, "bytea_output", "hex");

	/* 1, 2 and 3 are the same: the shortest text that reads back exactly */
	if ((heeds & SM_HEEDS_FLOAT_DIGITS) && extra_float_digits < 1)
		fix_setting(&nest, "extra_float_digits", "1");

	if (heeds & SM_HEEDS_MONETARY)
	{
		const char *found = GetConfigOptionResetString("lc_monetary");

		if (found != NULL && strcmp(found, GetConfigOption("lc_monetary", false, false)) != 0)
			fix_setting(&nest, "lc_monetary", found);
	}

	if ((heeds & SM_HEEDS_QUOTING) && quote_all_identifiers)
		fix_setting(&nest, "quote_all_identifiers", "off");
	if ((heeds & SM_HEEDS_SEARCH_PATH) &&
		strcmp(namespace_search_path, "pg_catalog, pg_temp") != 0)
		fix_setting(&nest, "search_path", "pg_catalog, pg_temp");

	return nest;
}

void
sm_encode_end_settings(int nest)
{
	if (nest != 0)
		AtEOXact_GUC(true, nest);
}

/* Before a tuple is encoded: does the encoder still know all about it? */
static void
check_encoder(SmEncoder *enc, TupleTableSlot *slot)
{
	uint64		seen = cast_changes;

	if (slot->tts_tupleDescriptor->natts != enc->natts)
		elog(ERROR, "tuple has %d attributes, its encoder knows %d",
			 slot->tts_tupleDescriptor->natts, enc->natts);

	if (enc->casts_seen == seen)
		return;

	/* only the types that are not built in have a say in pg_cast */
	for (int i = 0; i < enc->natts; i++)
	{
		if (enc->columns[i].basetype >= FirstNormalObjectId)
			resolve_column(&enc->columns[i], enc->cxt);
	}
	enc->casts_seen = seen;
}

/* What appendBinaryStringInfo() does; a row calls it a few dozen times. */
static inline void
append_bytes(StringInfo out, const char *bytes, int len)
{
	if (unlikely(out->len + len >= out->maxlen))
		enlargeStringInfo(out, len);
	memcpy(out->data + out->len, bytes, len);
	out->len += len;
	out->data[out->len] = '\0';
}

/*
 * Append str as a JSON string.  What escape_json() does, but copying runs of
 * ordinary bytes at once, and without needing a NUL at the end.  Every server
 * encoding leaves ASCII bytes to ASCII characters, so bytes will do.
 */
static void
append_string(StringInfo out, const char *str, int len)
{
	const char *run = str;
	const char *end = str + len;

	append_bytes(out, "\"", 1);
	for (const char *p = str; p < end; p++)
	{
		unsigned char c = (unsigned char) *p;

		if (likely(c >= ' ' && c != '"' && c != '\\'))
			continue;

		append_bytes(out, run, p - run);
		run = p + 1;
		switch (c)
		{
			case '\b':
				appendStringInfoString(out, "\\b");
				break;
			case '\f':
				appendStringInfoString(out, "\\f");
				break;
			case '\n':
				appendStringInfoString(out, "\\n");
				break;
			case '\r':
				appendStringInfoString(out, "\\r");
				break;
			case '\t':
				appendStringInfoString(out, "\\t");
				break;
			case '"':
				appendStringInfoString(out, "\\\"");
				break;
			case '\\':
				appendStringInfoString(out, "\\\\");
				break;
			default:
				appendStringInfo(out, "\\u%04x", c);
				break;
		}
	}
	append_bytes(out, run, end - run);
	append_bytes(out, "\"", 1);
}

/* Append characters as a JSON string, or bare, as text. */
static void
append_chars(StringInfo out, const char *str, int len, bool bare)
{
	if (bare)
		append_bytes(out, str, len);
	else
		append_string(out, str, len);
}

/* Append the characters of a text, or of what is stored like one. */
static void
append_varlena(StringInfo out, Datum value, bool bare)
{
	struct varlena *chars = PG_DETOAST_DATUM_PACKED(value);

	append_chars(out, VARDATA_ANY(chars), VARSIZE_ANY_EXHDR(chars), bare);
	if ((Pointer) chars != DatumGetPointer(value))
		pfree(chars);
}

/* Append a value as JSON; with bare, strings without their quotes and escapes. */
static void
append_value(SmColumn *col, Datum value, StringInfo out, bool bare)
{
	switch (col->kind)
	{
		case SM_KIND_BOOL:
			appendStringInfoString(out, DatumGetBool(value) ? "true" : "false");
			break;
		case SM_KIND_INT2:
			enlargeStringInfo(out, MAXINT8LEN);
			out->len += pg_itoa(DatumGetInt16(value), out->data + out->len);
			break;
		case SM_KIND_INT4:
			enlargeStringInfo(out, MAXINT8LEN);
			out->len += pg_ltoa(DatumGetInt32(value), out->data + out->len);
			break;
		case SM_KIND_INT8:
			enlargeStringInfo(out, MAXINT8LEN);
			out->len += pg_lltoa(DatumGetInt64(value), out->data + out->len);
			break;
		case SM_KIND_NUMBER:
			{
				char	   *str = OutputFunctionCall(&col->output, value);
				int			len = strlen(str);

				append_chars(out, str, len, bare || IsValidJsonNumber(str, len));
				pfree(str);
				break;
			}
		case SM_KIND_TEXT:
			append_varlena(out, value, bare);
			break;
		case SM_KIND_JSON:
			append_varlena(out, value, true);
			break;
		case SM_KIND_JSONB:
			{
				Jsonb	   *jb = DatumGetJsonbP(value);

				(void) JsonbToCString(out, &jb->root, VARSIZE(jb));
				if ((Pointer) jb != DatumGetPointer(value))
					pfree(jb);
				break;
			}
		case SM_KIND_DATETIME:
			{
				static const int utc = 0;
				char		buf[MAXDATELEN + 1];

				(void) JsonEncodeDateTime(buf, value, col->basetype, &utc);
				append_chars(out, buf, strlen(buf), bare);
				break;
			}
		case SM_KIND_ARRAY:
			append_varlena(out, DirectFunctionCall1(array_to_json, value), true);
			break;
		case SM_KIND_COMPOSITE:
			append_varlena(out, DirectFunctionCall1(row_to_json, value), true);
			break;
		case SM_KIND_CAST:
			/* somebody's code, in any language: looked up afresh, as core does */
			append_varlena(out, OidFunctionCall1(col->castfunc, value), true);
			break;
		case SM_KIND_OTHER:
			{
				char	   *str = OutputFunctionCall(&col->output, value);

				append_chars(out, str, strlen(str), bare);
				pfree(str);
				break;
			}
	}
}

/* Append one member of an object, whose brace was opened at start. */
static void
append_member(SmColumn *col, Datum value, bool isnull, StringInfo out, int start)
{
	/* the first member needs no comma */
	int			skip = (out->len == start + 1) ? 1 : 0;

	append_bytes(out, col->key + skip, col->keylen - skip);
	if (isnull)
		append_bytes(out, "null", 4);
	else
		append_value(col, value, out, false);
}

void
sm_encode_row(SmEncoder *enc, TupleTableSlot *slot, StringInfo out)
{
	int			start = out->len;

	check_encoder(enc, slot);
	slot_getallattrs(slot);

	appendStringInfoChar(out, '{');
	for (int i = 0; i < enc->natts; i++)
	{
		if (!enc->columns[i].dropped)
			append_member(&enc->columns[i], slot->tts_values[i], slot->tts_isnull[i],
						  out, start);
	}
	appendStringInfoChar(out, '}');
}

/*
 * Are two values the same, bit for bit once detoasted?  An UPDATE leaves a long
 * value that it does not touch where it is, so equal TOAST pointers are the
 * common case and need no reading.
 */
static bool
same_image(SmColumn *col, Datum a, Datum b)
{
	if (col->typlen == -1)
	{
		Pointer		pa = DatumGetPointer(a);
		Pointer		pb = DatumGetPointer(b);

		if (VARATT_IS_EXTERNAL_ONDISK(pa) && VARATT_IS_EXTERNAL_ONDISK(pb) &&
			memcmp(pa, pb, VARSIZE_EXTERNAL(pa)) == 0)
			return true;
	}

	return datum_image_eq(a, b, col->typbyval, col->typlen);
}

bool
sm_encode_same(SmEncoder *enc, TupleTableSlot *a, TupleTableSlot *b, AttrNumber attnum)
{
	bool		anull;
	bool		bnull;
	Datum		avalue = slot_getattr(a, attnum, &anull);
	Datum		bvalue = slot_getattr(b, attnum, &bnull);

	return anull == bnull && (anull || same_image(&enc->columns[attnum - 1], avalue, bvalue));
}

int
sm_encode_changed(SmEncoder *enc, TupleTableSlot *oldslot, TupleTableSlot *newslot,
				  StringInfo out)
{
	int			start = out->len;
	int			nchanged = 0;

	Assert(newslot->tts_tupleDescriptor->natts == enc->natts);

	check_encoder(enc, oldslot);
	slot_getallattrs(oldslot);
	slot_getallattrs(newslot);

	appendStringInfoChar(out, '{');
	for (int i = 0; i < enc->natts; i++)
	{
		SmColumn   *col = &enc->columns[i];
		bool		oldnull = oldslot->tts_isnull[i];
		bool		newnull = newslot->tts_isnull[i];

		if (col->dropped || (oldnull && newnull))
			continue;
		if (!oldnull && !newnull &&
			same_image(col, oldslot->tts_values[i], newslot->tts_values[i]))
			continue;

		append_member(col, oldslot->tts_values[i], oldnull, out, start);
		nchanged++;
	}
	appendStringInfoChar(out, '}');

	return nchanged;
}

/* Append one column.  Returns whether it is there, which is to say, not null. */
static bool
append_column(SmEncoder *enc, TupleTableSlot *slot, AttrNumber attnum, StringInfo out,
			  bool bare)
{
	SmColumn   *col;
	bool		isnull;
	Datum		value;

	Assert(attnum > 0 && attnum <= enc->natts);
	col = &enc->columns[attnum - 1];
	Assert(!col->dropped);

	check_encoder(enc, slot);
	value = slot_getattr(slot, attnum, &isnull);
	if (!isnull)
		append_value(col, value, out, bare);
	return !isnull;
}

bool
sm_encode_text(SmEncoder *enc, TupleTableSlot *slot, AttrNumber attnum, StringInfo out)
{
	return append_column(enc, slot, attnum, out, true);
}

bool
sm_encode_value(SmEncoder *enc, TupleTableSlot *slot, AttrNumber attnum, StringInfo out)
{
	bool		there = append_column(enc, slot, attnum, out, false);

	if (!there)
		appendStringInfoString(out, "null");
	return there;
}
