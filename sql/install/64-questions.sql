/*
 * Headquarters answers a branch's questions: has everything arrived (verify), are the
 * rows the same (reconcile), what must be known before a cut (reference).
 *
 * - Questions and answers are JSON; doc/central-api.yaml is their definition.  What
 *   both sides compute, they compute by the same functions: event_digest(),
 *   reconcile_bucket(), reconcile_digest().
 * - A question costs one pass over what it names, in bounded memory.  The inbox has no
 *   index by number, which every sale would pay for: a block of numbers comes with its
 *   lowest and highest id, and ids grow with time.
 * - Verifying writes what the branch declares void, as its last act, so that batches of
 *   the branch do not wait while digests are computed.  The other two write nothing.
 */

CREATE TABLE softmobile.central_reference_data (
	name text COLLATE "C" NOT NULL
		CONSTRAINT reference_name_shape CHECK (name ~ '^[A-Za-z0-9_-]{1,63}$'),
	branch_id text COLLATE "C",
	content json NOT NULL,
	bytes bigint NOT NULL,
	digest text NOT NULL,
	updated_at timestamptz NOT NULL,
	UNIQUE NULLS NOT DISTINCT (name, branch_id)
);
COMMENT ON TABLE softmobile.central_reference_data IS 'What branches fetch before a cut, such as the catalogue. Written by central_set_reference().';
COMMENT ON COLUMN softmobile.central_reference_data.branch_id IS 'For this branch alone, which then does not get the document of all; NULL: for all.';
COMMENT ON COLUMN softmobile.central_reference_data.digest IS 'SHA-256 of the content as UTF-8, which is sent byte for byte; hexadecimal.';

SELECT pg_extension_config_dump('softmobile.central_reference_data', '');

CREATE TYPE softmobile.central_claim AS (
	epoch uuid,
	epoch_no integer,
	lane text,
	highest bigint,
	void int8multirange
);
COMMENT ON TYPE softmobile.central_claim IS 'Internal: what a branch says of one of its lanes when it verifies.';

CREATE TYPE softmobile.central_block AS (
	epoch uuid,
	lane text,
	"from" bigint,
	"to" bigint,
	first_id uuid,
	last_id uuid,
	members int8multirange,
	digest text
);
COMMENT ON TYPE softmobile.central_block IS 'Internal: numbers of a lane, from included, to not; the lowest and highest id that the branch has in it; and of its events what the branch has.';

CREATE TYPE softmobile.central_comparison AS (
	branch text,
	entity_type text,
	columns text[],
	date_column text,
	"from" text,
	"to" text,
	buckets integer,
	counts bigint[],
	digests text[]
);
COMMENT ON TYPE softmobile.central_comparison IS 'Internal: the question of POST /reconcile.';

/* Questions. */

CREATE FUNCTION softmobile.central_is_doubled(object json) RETURNS boolean
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN (SELECT count(*) > count(DISTINCT k.key) FROM json_object_keys(object) AS k (key));
COMMENT ON FUNCTION softmobile.central_is_doubled(json) IS 'Internal: whether a key stands twice in a JSON object.';

CREATE FUNCTION softmobile.central_question(body text, max_bytes integer) RETURNS json
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	question json;
	doubled boolean;
BEGIN
	IF octet_length(body) > max_bytes THEN
		RAISE EXCEPTION 'the question has more than % bytes', max_bytes USING ERRCODE = 'SM413';
	END IF;
	BEGIN
		question := body::json;
		doubled := json_typeof(question) = 'object' AND softmobile.central_is_doubled(question);
	EXCEPTION WHEN data_exception OR program_limit_exceeded THEN
		RAISE EXCEPTION 'the body cannot be read as JSON: %', SQLERRM USING ERRCODE = 'SM400';
	END;
	IF json_typeof(question) IS DISTINCT FROM 'object' THEN
		RAISE EXCEPTION 'the question is not a JSON object' USING ERRCODE = 'SM422';
	ELSIF doubled THEN
		RAISE EXCEPTION 'a key of the question stands twice' USING ERRCODE = 'SM422';
	END IF;
	RETURN question;
END
$$;
COMMENT ON FUNCTION softmobile.central_question(text, integer) IS 'Internal: a question as JSON. Errors: SM400 no JSON, SM413 too long, SM422 no object.';

CREATE FUNCTION softmobile.central_list(question json, key text, max_elements integer) RETURNS json
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	list json := coalesce(question -> key, '[]');
BEGIN
	IF json_typeof(list) <> 'array' THEN
		RAISE EXCEPTION '"%" must be an array', key USING ERRCODE = 'SM422';
	ELSIF json_array_length(list) > max_elements THEN
		RAISE EXCEPTION '"%" has more than % elements', key, max_elements USING ERRCODE = 'SM413', HINT = 'Ask in parts.';
	ELSIF EXISTS (SELECT FROM json_array_elements(list) AS e (value) WHERE json_typeof(e.value) <> 'object') THEN
		RAISE EXCEPTION '"%" must be an array of objects', key USING ERRCODE = 'SM422';
	ELSIF EXISTS (SELECT FROM json_array_elements(list) AS e (value) WHERE softmobile.central_is_doubled(e.value)) THEN
		RAISE EXCEPTION 'in an object of "%" a key stands twice', key USING ERRCODE = 'SM422';
	END IF;
	RETURN list;
END
$$;
COMMENT ON FUNCTION softmobile.central_list(json, text, integer) IS 'Internal: a list of objects in a question; empty when it is not there. Errors: SM413, SM422.';

CREATE FUNCTION softmobile.central_may_ask(token_hash bytea, branch text) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	allowed text[] := softmobile.central_allowed(token_hash);
BEGIN
	IF branch IS NULL THEN
		RAISE EXCEPTION 'the question names no branch' USING ERRCODE = 'SM422';
	ELSIF branch <> ALL (allowed) OR NOT EXISTS (SELECT FROM softmobile.central_branch b WHERE b.branch_id = branch AND b.active) THEN
		RAISE EXCEPTION 'this token may not speak for branch "%"', left(branch, 100)
			USING ERRCODE = 'SM403', HINT = 'Ask headquarters for a token of this branch, or to activate it.';
	END IF;
END
$$;
COMMENT ON FUNCTION softmobile.central_may_ask(bytea, text) IS 'Internal: returns when the holder of the token (its SHA-256) may ask about the branch. Errors: SM401, SM403, SM422.';

/* Verify. */

CREATE FUNCTION softmobile.central_check_blocks(blocks softmobile.central_block[], key text, max_numbers bigint) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	problem text;
BEGIN
	SELECT p.problem INTO problem
	FROM unnest(blocks) AS b CROSS JOIN LATERAL (SELECT CASE
		WHEN b.epoch IS NULL THEN 'epoch must be a UUID'
		WHEN b.lane IN ('high', 'normal', 'low') IS NOT TRUE THEN 'lane must be high, normal or low'
		WHEN b."from" < 1 OR b."from" < b."to" IS NOT TRUE THEN 'from must be 1 or more and less than to'
		WHEN b.first_id <= b.last_id IS NOT TRUE THEN 'first_id and last_id must be the lowest and the highest id of the block''s events'
		WHEN key = 'contents' AND b.members IS NULL THEN 'members must be a multirange of numbers'
		WHEN key = 'contents' AND b.digest ~ '^[0-9a-f]{64}$' IS NOT TRUE THEN 'digest must be 64 hexadecimal digits'
		END) AS p (problem)
	WHERE p.problem IS NOT NULL LIMIT 1;
	IF FOUND THEN
		RAISE EXCEPTION 'a block of "%" cannot be used: %', key, problem USING ERRCODE = 'SM422';
	ELSIF (SELECT sum(b."to" - b."from") FROM unnest(blocks) AS b) > max_numbers THEN
		RAISE EXCEPTION 'the blocks of "%" have together more than % numbers', key, max_numbers
			USING ERRCODE = 'SM413', HINT = 'Ask in parts.';
	END IF;
END
$$;
COMMENT ON FUNCTION softmobile.central_check_blocks(softmobile.central_block[], text, bigint) IS 'Internal: refuses blocks that are none, and too many. Errors: SM413, SM422.';

CREATE FUNCTION softmobile.central_check_claims(claims softmobile.central_claim[]) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	problem text;
BEGIN
	SELECT p.problem INTO problem
	FROM unnest(claims) AS c CROSS JOIN LATERAL (SELECT CASE
		WHEN c.epoch IS NULL THEN 'epoch must be a UUID'
		WHEN c.epoch_no > 0 IS NOT TRUE THEN 'epoch_no must be a positive integer'
		WHEN c.lane IN ('high', 'normal', 'low') IS NOT TRUE THEN 'lane must be high, normal or low'
		WHEN c.highest BETWEEN 0 AND 9223372036854775806 IS NOT TRUE THEN 'highest must be the highest number drawn'
		WHEN NOT int8multirange(int8range(1, c.highest + 1)) @> c.void THEN 'void numbers must lie between 1 and highest'
		END) AS p (problem)
	WHERE p.problem IS NOT NULL LIMIT 1;
	IF FOUND THEN
		RAISE EXCEPTION 'an object of "lanes" cannot be used: %', problem USING ERRCODE = 'SM422';
	ELSIF (SELECT count(*) > count(DISTINCT (c.epoch, c.lane)) FROM unnest(claims) AS c) THEN
		RAISE EXCEPTION 'a lane stands twice in "lanes"' USING ERRCODE = 'SM422';
	ELSIF (SELECT count(*) > 250000 FROM unnest(claims) AS c CROSS JOIN LATERAL unnest(c.void)) THEN
		RAISE EXCEPTION 'the lanes have together more than 250000 ranges of void numbers'
			USING ERRCODE = 'SM413', HINT = 'Ask in parts.';
	END IF;
END
$$;
COMMENT ON FUNCTION softmobile.central_check_claims(softmobile.central_claim[]) IS 'Internal: refuses what a lane cannot be, and too much of it. Errors: SM413, SM422.';

CREATE FUNCTION softmobile.central_block_events(branch text, block softmobile.central_block) RETURNS TABLE (seq bigint, id uuid, digest text)
LANGUAGE sql STABLE
BEGIN ATOMIC
	SELECT i.seq, i.id, softmobile.event_digest(i.id, i.entity_type, i.entity_id, i.op, i.actor, i.reason, i.data)
	FROM softmobile.central_inbox i
	WHERE i.branch_id = branch AND i.id BETWEEN (block).first_id AND (block).last_id
		AND i.epoch = (block).epoch AND i.lane = (block).lane AND i.seq >= (block)."from" AND i.seq < (block)."to";
END;
COMMENT ON FUNCTION softmobile.central_block_events(text, softmobile.central_block) IS
'Internal: the events of a block that central has received. No search_path, so that it is inlined; its operators were bound when it was created.';

CREATE FUNCTION softmobile.central_declare_void(branch text, claim softmobile.central_claim) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	known int8multirange;
	merged int8multirange;
BEGIN
	SELECT coalesce(range_agg(int8range(s.first_seq, s.last_seq, '[]')), '{}') INTO known
	FROM softmobile.central_span s
	WHERE s.branch_id = branch AND s.epoch = claim.epoch AND s.lane = claim.lane AND s.void;
	IF known @> claim.void IS NOT FALSE THEN
		RETURN;
	END IF;
	-- Not range by range, as central_add_numbers() does: the first declaration after a bad day has a hundred thousand.
	merged := known + claim.void;
	DELETE FROM softmobile.central_span s
	WHERE s.branch_id = branch AND s.epoch = claim.epoch AND s.lane = claim.lane AND s.void AND merged @> s.first_seq - 1;
	INSERT INTO softmobile.central_span AS s (branch_id, epoch, lane, void, first_seq, last_seq)
	SELECT branch, claim.epoch, claim.lane, true, lower(m.r), upper(m.r) - 1 FROM unnest(merged) AS m (r) WHERE NOT known @> m.r
	ON CONFLICT (branch_id, epoch, lane, void, first_seq) DO UPDATE SET last_seq = excluded.last_seq;
END
$$;
COMMENT ON FUNCTION softmobile.central_declare_void(text, softmobile.central_claim) IS 'Internal: adds the void numbers of a lane to those known. The caller has locked the branch.';

CREATE FUNCTION softmobile.central_verify(body text, token_hash bytea) RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off
AS $$
#variable_conflict use_column
DECLARE
	question json;
	branch text;
	claims softmobile.central_claim[];
	blocks softmobile.central_block[];
	details softmobile.central_block[];
	contents json;
	events json;
	lanes json;
BEGIN
	PERFORM softmobile.central_allowed(token_hash);
	question := softmobile.central_question(body, 16777216);
	BEGIN
		branch := question ->> 'branch';
		claims := ARRAY(SELECT c FROM json_populate_recordset(NULL::softmobile.central_claim, softmobile.central_list(question, 'lanes', 1000)) AS c);
		blocks := ARRAY(SELECT b FROM json_populate_recordset(NULL::softmobile.central_block, softmobile.central_list(question, 'contents', 256)) AS b);
		details := ARRAY(SELECT b FROM json_populate_recordset(NULL::softmobile.central_block, softmobile.central_list(question, 'events', 256)) AS b);
	EXCEPTION WHEN data_exception OR program_limit_exceeded THEN
		RAISE EXCEPTION 'the question cannot be understood: %', left(SQLERRM, 200) USING ERRCODE = 'SM422';
	END;
	PERFORM softmobile.central_may_ask(token_hash, branch);
	PERFORM softmobile.central_check_claims(claims);
	PERFORM softmobile.central_check_blocks(blocks, 'contents', 1048576);
	PERFORM softmobile.central_check_blocks(details, 'events', 65536);

	SELECT coalesce(json_agg(json_build_object('epoch', b.epoch, 'lane', b.lane, 'from', b."from", 'to', b."to", 'members', held.members, 'digest', held.digest)), '[]')
	INTO contents
	FROM unnest(blocks) AS b CROSS JOIN LATERAL (
		SELECT coalesce(range_agg(int8range(e.seq, e.seq + 1)), '{}') AS members,
			encode(sha256(convert_to(coalesce(string_agg(e.digest, '' ORDER BY e.seq, e.id), ''), 'UTF8')), 'hex') AS digest
		FROM softmobile.central_block_events(branch, b) AS e) AS held
	WHERE held.members <> b.members OR held.digest <> b.digest;

	SELECT coalesce(json_agg(json_build_object('epoch', b.epoch, 'lane', b.lane, 'from', b."from", 'to', b."to", 'ids', held.ids, 'seqs', held.seqs, 'digests', held.digests)), '[]')
	INTO events
	FROM unnest(details) AS b CROSS JOIN LATERAL (
		SELECT coalesce(json_agg(e.id ORDER BY e.seq, e.id), '[]') AS ids, coalesce(json_agg(e.seq ORDER BY e.seq, e.id), '[]') AS seqs,
			coalesce(json_agg(e.digest ORDER BY e.seq, e.id), '[]') AS digests
		FROM softmobile.central_block_events(branch, b) AS e) AS held;

	-- From here on nobody else writes what belongs to this branch.
	UPDATE softmobile.central_branch b SET last_seen = now() WHERE b.branch_id = branch;
	INSERT INTO softmobile.central_lane (branch_id, epoch, lane, epoch_no, highest_seq, events)
	SELECT branch, c.epoch, c.lane, c.epoch_no, 0, 0 FROM unnest(claims) AS c
	ON CONFLICT (branch_id, epoch, lane) DO NOTHING;
	PERFORM softmobile.central_declare_void(branch, c) FROM unnest(claims) AS c;

	SELECT coalesce(json_agg(json_build_object('epoch', l.epoch, 'epoch_no', l.epoch_no, 'lane', l.lane, 'highest', l.highest_seq,
			'received', l.received, 'void', l.void, 'forks', coalesce(f.forks, 0)) ORDER BY l.epoch_no, l.epoch, l.lane), '[]')
	INTO lanes
	FROM softmobile.central_lanes l LEFT JOIN (
			SELECT f.epoch, f.lane, count(*) AS forks FROM softmobile.central_fork f WHERE f.branch_id = branch GROUP BY f.epoch, f.lane) AS f USING (epoch, lane)
	WHERE l.branch_id = branch;

	RETURN json_build_object('branch', branch, 'lanes', lanes, 'contents', contents, 'events', events);
END
$$;
COMMENT ON FUNCTION softmobile.central_verify(text, bytea) IS
'Answers POST /verify for the holder of the token (its SHA-256): notes the void numbers of each lane named, and returns what central has of all lanes of the branch, the blocks that differ, and the digests of single events. Errors, as HTTP status: SM400 no JSON, SM401 token not valid, SM403 not for this branch, SM413 too much at once, SM422 not as documented.';

/* Reconcile. */

CREATE FUNCTION softmobile.reconcile_bucket(entity_id text, buckets integer) RETURNS integer
LANGUAGE sql STABLE STRICT PARALLEL SAFE
RETURN (('x' || left(encode(sha256(convert_to(entity_id, 'UTF8')), 'hex'), 8))::bit(32)::bigint % buckets)::integer;
COMMENT ON FUNCTION softmobile.reconcile_bucket(text, integer) IS
'Internal: the bucket of a row, from 0: the first four bytes of the SHA-256 of its entity_id, modulo buckets. No search_path, so that it is inlined; its operators were bound when it was created.';

CREATE FUNCTION softmobile.reconcile_digest(entity_id text, VARIADIC "values" text[]) RETURNS bigint
LANGUAGE sql STABLE PARALLEL SAFE
RETURN ('x' || left(encode(sha256(convert_to(array_to_string(array_prepend(entity_id, "values"), E'\n', E'\x01'), 'UTF8')), 'hex'), 16))::bit(64)::bigint;
COMMENT ON FUNCTION softmobile.reconcile_digest(text, text[]) IS
'Internal: what stands for a row when it is compared: the first eight bytes of the SHA-256 of entity_id and the values, each after a line feed, NULL as \x01. No search_path, so that it is inlined; its operators were bound when it was created.';

CREATE FUNCTION softmobile.central_reconcile(body text, token_hash bytea) RETURNS text
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET timezone = 'UTC'
AS $$
#variable_conflict use_column
DECLARE
	question json;
	q softmobile.central_comparison;
	problem text;
	first_day date;
	last_day date;
	compared bigint;
	differing json;
	too_much boolean;
BEGIN
	PERFORM softmobile.central_allowed(token_hash);
	question := softmobile.central_question(body, 1048576);
	BEGIN
		q := json_populate_record(NULL::softmobile.central_comparison, question);
		first_day := q."from";
		last_day := q."to";
	EXCEPTION WHEN data_exception OR program_limit_exceeded THEN
		RAISE EXCEPTION 'the question cannot be understood: %', left(SQLERRM, 200) USING ERRCODE = 'SM422';
	END;
	PERFORM softmobile.central_may_ask(token_hash, q.branch);
	problem := CASE
		WHEN q.entity_type IS NULL THEN 'entity_type must be a text'
		WHEN q.columns IS NULL OR array_ndims(q.columns) > 1 OR array_position(q.columns, NULL) IS NOT NULL THEN 'columns must be an array of texts'
		WHEN (SELECT count(*) > count(DISTINCT c.name) FROM unnest(q.columns) AS c (name)) THEN 'a column stands twice in columns'
		WHEN NOT (q."from" ~ '^\d{4}-\d\d-\d\d$' AND q."to" ~ '^\d{4}-\d\d-\d\d$') THEN 'from and to must be dates, as 2026-01-31'
		WHEN q.date_column IS NOT NULL AND first_day <= last_day IS NOT TRUE THEN 'from must be a date, and to the same or a later one'
		WHEN q.buckets BETWEEN 1 AND 4096 IS NOT TRUE THEN 'buckets must be a number from 1 to 4096'
		WHEN (array_ndims(q.counts), cardinality(q.counts), array_ndims(q.digests), cardinality(q.digests)) IS DISTINCT FROM (1, q.buckets, 1, q.buckets)
			THEN 'counts and digests must be arrays with as many elements as there are buckets'
		WHEN array_position(q.counts, NULL) IS NOT NULL OR array_position(q.digests, NULL) IS NOT NULL THEN 'counts and digests must not hold null'
		WHEN EXISTS (SELECT FROM unnest(q.digests) AS d (digest) WHERE d.digest !~ '^[0-9a-f]{16}$') THEN 'digests must be 16 hexadecimal digits each'
		END;
	IF problem IS NOT NULL THEN
		RAISE EXCEPTION 'the question cannot be answered: %', problem USING ERRCODE = 'SM422';
	ELSIF cardinality(q.columns) > 50 THEN
		RAISE EXCEPTION 'at most 50 columns are compared' USING ERRCODE = 'SM413';
	END IF;

	BEGIN
		WITH held AS MATERIALIZED (
			SELECT r.entity_id, r."values", softmobile.reconcile_bucket(r.entity_id, q.buckets) AS bucket,
				softmobile.reconcile_digest(r.entity_id, VARIADIC r."values") AS digest
			FROM (
				SELECT p.entity_id, ARRAY(SELECT p.row ->> c.name FROM unnest(q.columns) AS c (name)) AS "values"
				FROM softmobile.central_projection p
				WHERE p.branch_id = q.branch AND p.entity_type = q.entity_type AND NOT p.deleted
					AND (q.date_column IS NULL OR (p.row ->> q.date_column)::timestamptz::date BETWEEN first_day AND last_day)
				OFFSET 0) AS r
		), sums AS MATERIALIZED (
			SELECT h.bucket, count(*) AS rows, lpad(to_hex(bit_xor(h.digest)), 16, '0') AS digest FROM held h GROUP BY h.bucket
		), wrong AS MATERIALIZED (
			SELECT a.place - 1 AS bucket
			FROM unnest(q.counts, q.digests) WITH ORDINALITY AS a (rows, digest, place) LEFT JOIN sums s ON s.bucket = a.place - 1
			WHERE a.rows <> coalesce(s.rows, 0) OR a.digest <> coalesce(s.digest, '0000000000000000')
		), listed AS MATERIALIZED (
			SELECT h.bucket, h.entity_id, json_object(q.columns, h."values") AS "values" FROM held h WHERE h.bucket IN (SELECT w.bucket FROM wrong w) LIMIT 50001
		)
		SELECT (SELECT coalesce(sum(s.rows), 0) FROM sums s), size.too_much, CASE WHEN NOT size.too_much THEN (
			SELECT coalesce(json_agg(json_build_object('bucket', b.bucket, 'rows', b.rows) ORDER BY b.bucket), '[]')
			FROM (
				SELECT w.bucket, coalesce(json_agg(json_build_object('entity_id', l.entity_id, 'values', l."values") ORDER BY l.entity_id)
					FILTER (WHERE l.entity_id IS NOT NULL), '[]') AS rows
				FROM wrong w LEFT JOIN listed l USING (bucket) GROUP BY w.bucket) AS b) END
		INTO compared, too_much, differing
		FROM (SELECT count(*) > 50000 OR coalesce(sum(octet_length(l.entity_id) + octet_length(l."values"::text)), 0) > 16777216 FROM listed l) AS size (too_much);
	EXCEPTION WHEN data_exception THEN
		RAISE EXCEPTION 'column "%" of entity type "%" holds something that is no date: %', left(q.date_column, 100), left(q.entity_type, 100), left(SQLERRM, 200)
			USING ERRCODE = 'SM422';
	END;
	IF too_much THEN
		RAISE EXCEPTION 'too many rows are in buckets that differ'
			USING ERRCODE = 'SM413', HINT = 'Ask for fewer days, or for more buckets.';
	END IF;
	RETURN json_build_object('branch', q.branch, 'entity_type', q.entity_type, 'rows', compared, 'buckets', differing);
END
$$;
COMMENT ON FUNCTION softmobile.central_reconcile(text, bytea) IS
'Answers POST /reconcile for the holder of the token (its SHA-256): compares the rows of an entity type by buckets of digests, and returns central''s rows of the buckets that differ. Errors, as HTTP status: SM400 no JSON, SM401 token not valid, SM403 not for this branch, SM413 too many rows, SM422 not as documented.';

/* Reference data. */

CREATE FUNCTION softmobile.central_set_reference(name text, content json, branch text DEFAULT NULL) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
	utf8 bytea := convert_to(content::text, 'UTF8');
	digest text := encode(sha256(utf8), 'hex');
BEGIN
	IF name ~ '^[A-Za-z0-9_-]{1,63}$' IS NOT TRUE THEN
		RAISE EXCEPTION 'reference data cannot be named "%"', left(name, 100)
			USING ERRCODE = 'invalid_parameter_value', HINT = 'Use 1 to 63 letters without accents, digits, _ and -.';
	ELSIF branch IS NOT NULL AND NOT EXISTS (SELECT FROM softmobile.central_branch b WHERE b.branch_id = branch) THEN
		RAISE EXCEPTION 'branch "%" does not exist', branch
			USING ERRCODE = 'undefined_object', HINT = 'SELECT branch_id FROM softmobile.central_branch lists them.';
	ELSIF octet_length(utf8) > 67108864 THEN
		RAISE EXCEPTION 'reference data "%" is too large', name
			USING ERRCODE = 'program_limit_exceeded', DETAIL = format('It has %s bytes; 64 MiB are allowed.', octet_length(utf8)), HINT = 'Divide it.';
	END IF;
	IF content IS NULL THEN
		DELETE FROM softmobile.central_reference_data d WHERE d.name = name AND d.branch_id IS NOT DISTINCT FROM branch;
		IF NOT FOUND THEN
			RAISE EXCEPTION 'there is no reference data "%"', name
				USING ERRCODE = 'undefined_object', HINT = 'SELECT name, branch_id FROM softmobile.central_reference_data lists it.';
		END IF;
	ELSE
		INSERT INTO softmobile.central_reference_data AS d (name, branch_id, content, bytes, digest, updated_at)
		VALUES (name, branch, content, octet_length(utf8), digest, now())
		ON CONFLICT ON CONSTRAINT central_reference_data_name_branch_id_key DO UPDATE
		SET content = excluded.content, bytes = excluded.bytes, digest = excluded.digest, updated_at = excluded.updated_at;
	END IF;
	INSERT INTO softmobile.central_audit (action, branch_id, details, current_user_name)
	VALUES ('set_reference', branch, jsonb_build_object('name', name, 'bytes', octet_length(utf8), 'digest', digest), softmobile.calling_role());
END
$$;
COMMENT ON FUNCTION softmobile.central_set_reference(text, json, text) IS
'Offers a JSON document to branches under a name, to all or, instead of that, to one; replaces the one before; content NULL takes it back. Errors: 22023 name, 42704 no such branch or nothing to take back, 54000 more than 64 MiB.';

CREATE FUNCTION softmobile.central_reference(token_hash bytea, name text, branch text) RETURNS text
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
	answer text;
BEGIN
	PERFORM softmobile.central_may_ask(token_hash, branch);
	IF name IS NULL THEN
		SELECT json_build_object('resources', coalesce(json_agg(json_build_object('name', r.name, 'bytes', r.bytes, 'digest', r.digest, 'updated_at', r.updated_at) ORDER BY r.name), '[]'))
		INTO answer
		FROM (
			SELECT DISTINCT ON (d.name) d.name, d.bytes, d.digest, d.updated_at
			FROM softmobile.central_reference_data d WHERE d.branch_id = branch OR d.branch_id IS NULL
			ORDER BY d.name, d.branch_id NULLS LAST) AS r;
		RETURN answer;
	END IF;
	SELECT d.content INTO answer FROM softmobile.central_reference_data d
	WHERE d.name = name AND (d.branch_id = branch OR d.branch_id IS NULL)
	ORDER BY d.branch_id NULLS LAST LIMIT 1;
	IF NOT FOUND THEN
		RAISE EXCEPTION 'there is no reference data "%"', left(name, 100)
			USING ERRCODE = 'SM404', HINT = 'Ask without a name for the list.';
	END IF;
	RETURN answer;
END
$$;
COMMENT ON FUNCTION softmobile.central_reference(bytea, text, text) IS
'Answers GET /reference for the holder of the token (its SHA-256): the reference data of this name for the branch, byte for byte; name NULL: the list. Errors, as HTTP status: SM401 token not valid, SM403 not for this branch, SM404 no such name, SM422 no branch.';
