/*
 * Attached tables: which are captured and how, and what DDL may do to them.
 */

CREATE FUNCTION softmobile.default_priority(entity_type text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE SET search_path = pg_catalog, pg_temp
RETURN CASE
	WHEN lower(entity_type) IN ('sale', 'sale_line', 'sale_item', 'sale_return', 'return', 'purchase_return', 'inventory', 'inventory_movement',
		'stock_move', 'repair', 'repair_order', 'repair_order_part', 'user', 'role', 'permission') THEN 'HIGH'
	WHEN lower(entity_type) IN ('store', 'backup', 'draft') THEN 'LOW'
	ELSE 'NORMAL' END;
COMMENT ON FUNCTION softmobile.default_priority(text) IS
'Priority of an entity type whose attach() names none: sales, inventory movements, repairs, returns, users, roles and permissions HIGH; stores, backups and drafts LOW; all others NORMAL (original platform and operating procedure).';

CREATE FUNCTION softmobile.entity_flag(entity_type text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE SET search_path = pg_catalog, pg_temp
RETURN CASE
	WHEN lower(entity_type) ~ '^(sale|purchase)(_|$)' OR lower(entity_type) = 'return' THEN 'purchases_sales'
	WHEN lower(entity_type) ~ '^transfer(_|$)' OR lower(entity_type) = 'stock_move' THEN 'transfers'
	ELSE 'hybrid_prep' END;
COMMENT ON FUNCTION softmobile.entity_flag(text) IS 'Which of the settings softmobile.enable_* switches the capture of an entity type.';

CREATE FUNCTION softmobile.column_type(relation regclass, column_name name) RETURNS pg_type
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	WITH RECURSIVE below (oid) AS (
		SELECT a.atttypid FROM pg_attribute a WHERE a.attrelid = relation AND a.attname = column_name AND a.attnum > 0 AND NOT a.attisdropped
		UNION ALL
		SELECT y.typbasetype FROM below JOIN pg_type y ON y.oid = below.oid AND y.typtype = 'd')
	SELECT y FROM below JOIN pg_type y ON y.oid = below.oid WHERE y.typtype <> 'd';
END;
COMMENT ON FUNCTION softmobile.column_type(regclass, name) IS 'Internal: type of a column, below any domains; NULL: no such column.';

CREATE FUNCTION softmobile.column_kind(relation regclass, column_name name) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
RETURN (SELECT CASE
		WHEN y.oid IS NULL THEN NULL
		WHEN y.oid = ANY ('{int2, int4, int8, float4, float8, numeric}'::regtype[]) THEN 'number'
		WHEN y.oid = ANY ('{date, timestamp, timestamptz}'::regtype[]) THEN 'date'
		ELSE 'other' END
	FROM softmobile.column_type(relation, column_name) AS y);
COMMENT ON FUNCTION softmobile.column_kind(regclass, name) IS 'Internal: number, date (a timestamp too) or other, by the type below any domains; NULL: no such column.';

CREATE FUNCTION softmobile.check_column(relation regclass, column_name name, purpose text, kind text DEFAULT NULL) RETURNS int2
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	found int2 := (SELECT a.attnum FROM pg_attribute a
				   WHERE a.attrelid = relation AND a.attname = column_name AND a.attnum > 0 AND NOT a.attisdropped);
BEGIN
	IF found IS NULL THEN
		RAISE EXCEPTION 'column "%" of table % does not exist', column_name, relation
			USING ERRCODE = 'undefined_column', DETAIL = format('It was named as %s.', purpose),
				HINT = 'The table has: ' || (SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum)
					FROM pg_attribute a WHERE a.attrelid = relation AND a.attnum > 0 AND NOT a.attisdropped) || '.';
	END IF;
	IF kind <> softmobile.column_kind(relation, column_name) THEN
		RAISE EXCEPTION '% "%" of % is not a %', purpose, column_name, relation, kind
			USING ERRCODE = 'datatype_mismatch',
				HINT = CASE kind WHEN 'number' THEN 'Name a column of type numeric, integer, bigint, real or double precision.'
					ELSE 'Name a column of type date, timestamp or timestamp with time zone.' END;
	END IF;
	RETURN found;
END
$$;
COMMENT ON FUNCTION softmobile.check_column(regclass, name, text, text) IS
'Internal: number of a column. Errors: 42703 with the table''s columns as hint, 42804 when it is not of the kind number or date.';

CREATE FUNCTION softmobile.named_columns(c softmobile.captured_table) RETURNS name[]
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp
RETURN c.key_columns || c.branch_columns
	|| array_remove(ARRAY[c.reason_column, c.folio_column, c.amount_column, c.date_column, c.sku_column, c.quantity_column], NULL);
COMMENT ON FUNCTION softmobile.named_columns(softmobile.captured_table) IS 'Internal: the columns that attach() was told of an attached table, in the order of column_numbers.';

CREATE FUNCTION softmobile.tree_of(root regclass) RETURNS SETOF regclass
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	WITH RECURSIVE tree (relid, depth) AS (
		SELECT root::oid, 0
		UNION
		SELECT i.inhrelid, tree.depth + 1 FROM pg_inherits i JOIN tree ON i.inhparent = tree.relid)
	SELECT tree.relid::regclass FROM tree GROUP BY tree.relid ORDER BY min(tree.depth), tree.relid;
END;
COMMENT ON FUNCTION softmobile.tree_of(regclass) IS 'Internal: a table, its partitions and inheritance children on all levels, parents first.';

CREATE FUNCTION softmobile.roots_of(tables oid[]) RETURNS SETOF regclass
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	WITH RECURSIVE up (relid) AS (
		SELECT t FROM unnest(tables) AS t
		UNION
		SELECT i.inhparent FROM pg_inherits i JOIN up ON i.inhrelid = up.relid)
	SELECT c.relation FROM up JOIN softmobile.captured_table c ON c.relation = up.relid;
END;
COMMENT ON FUNCTION softmobile.roots_of(oid[]) IS 'Internal: the attached ones among tables and their ancestors.';

-- PostgreSQL fires a row's triggers in the order of their names. Ours goes before those of the application, which may
-- change the row again: hence its name. Parents first: a partition gets its row trigger from them.
CREATE FUNCTION softmobile.cover(root regclass) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	t regclass;
BEGIN
	FOR t IN SELECT softmobile.tree_of(root) LOOP
		CONTINUE WHEN (SELECT c.relkind NOT IN ('r', 'p') FROM pg_class c WHERE c.oid = t);
		IF NOT EXISTS (SELECT FROM pg_trigger g WHERE g.tgrelid = t AND g.tgfoid = 'softmobile.capture()'::regprocedure) THEN
			EXECUTE format('CREATE TRIGGER "!softmobile_capture" AFTER INSERT OR UPDATE OR DELETE ON %s FOR EACH ROW EXECUTE FUNCTION softmobile.capture(%s)',
				t, CASE WHEN t <> root THEN quote_literal('inherited') END);
		END IF;
		IF NOT EXISTS (SELECT FROM pg_trigger g WHERE g.tgrelid = t AND g.tgfoid = 'softmobile.refuse_truncate()'::regprocedure) THEN
			EXECUTE format('CREATE TRIGGER "!softmobile_refuse_truncate" BEFORE TRUNCATE ON %s FOR EACH STATEMENT EXECUTE FUNCTION softmobile.refuse_truncate()', t);
		END IF;
	END LOOP;
END
$$;
COMMENT ON FUNCTION softmobile.cover(regclass) IS 'Internal: creates the missing triggers on an attached table, its partitions and inheritance children.';

CREATE FUNCTION softmobile.grant_triggers() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	command text;
BEGIN
	FOR locked IN 0..1 LOOP
		FOR command IN
			WITH owner (role) AS (
				SELECT DISTINCT c.relowner
				FROM softmobile.captured_table t CROSS JOIN LATERAL softmobile.tree_of(t.relation) AS tree
					JOIN pg_class c ON c.oid = tree JOIN pg_roles r ON r.oid = c.relowner
				WHERE NOT r.rolsuper),
			holder (role) AS (
				SELECT DISTINCT a.grantee
				FROM pg_proc p CROSS JOIN LATERAL aclexplode(p.proacl) AS a
				WHERE p.oid = 'softmobile.capture()'::regprocedure AND a.grantee <> p.proowner)
			SELECT format(CASE WHEN o.role IS NULL THEN 'REVOKE EXECUTE ON FUNCTION %s FROM %I' ELSE 'GRANT EXECUTE ON FUNCTION %s TO %I' END,
				'softmobile.capture(), softmobile.refuse_truncate(), softmobile.usable_branch(text), '
				'softmobile.reconcile_bucket(text, integer), softmobile.reconcile_digest(text, text[])', pg_get_userbyid(coalesce(o.role, h.role)))
			FROM owner o FULL JOIN holder h USING (role)
			WHERE o.role IS NULL OR h.role IS NULL
		LOOP
			IF locked = 0 THEN
				-- Two that change one function's rights at once would fail; the second looks again.
				PERFORM pg_advisory_xact_lock(softmobile.branch_lock_class(), 0);
				EXIT;
			END IF;
			EXECUTE command;
		END LOOP;
	END LOOP;
END
$$;
COMMENT ON FUNCTION softmobile.grant_triggers() IS
'Internal: lets the owners of attached tables execute the trigger functions, and what their tables are read with as them, and nobody else. PostgreSQL gives a new partition its parent''s trigger with the rights of the partition''s creator. Called whenever that may have changed, but for REASSIGN OWNED, after which any ALTER TABLE of an attached table does it.';

CREATE FUNCTION softmobile.attach(
	"table" regclass,
	entity_type text,
	key text[] DEFAULT NULL,
	branch_column name DEFAULT NULL,
	priority text DEFAULT NULL,
	require_reason boolean DEFAULT true,
	reason_column name DEFAULT NULL,
	folio_column name DEFAULT NULL,
	amount_column name DEFAULT NULL,
	initial text DEFAULT 'none',
	branch_fallback_column name DEFAULT NULL,
	date_column name DEFAULT NULL,
	sku_column name DEFAULT NULL,
	quantity_column name DEFAULT NULL) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
	rel pg_class;
	ancestor regclass;
	branches name[] := array_remove(ARRAY[branch_column, branch_fallback_column], NULL);
	numbers int2[];
	entity softmobile.outbox_entity;
	k text;
	purpose text;
	kind text;
BEGIN
	SELECT c.* INTO rel FROM pg_class c WHERE c.oid = "table";
	IF NOT FOUND THEN
		RAISE EXCEPTION 'there is no table to attach'
			USING ERRCODE = 'undefined_table', HINT = 'Name an existing table, such as ''public.ventas''.';
	END IF;
	IF rel.relkind NOT IN ('r', 'p') THEN
		RAISE EXCEPTION '% is not a table', "table"
			USING ERRCODE = 'wrong_object_type',
				DETAIL = CASE rel.relkind WHEN 'v' THEN 'It is a view.' WHEN 'm' THEN 'It is a materialized view.' WHEN 'f' THEN 'It is a foreign table.'
					WHEN 'S' THEN 'It is a sequence.' ELSE 'It is something else.' END,
				HINT = 'Attach the ordinary or partitioned table that holds the rows.';
	END IF;
	IF rel.relnamespace IN ('pg_catalog'::regnamespace, 'information_schema'::regnamespace, 'pg_toast'::regnamespace) THEN
		RAISE EXCEPTION '% is a system table', "table"
			USING ERRCODE = 'insufficient_privilege', HINT = 'Attach the application''s own tables.';
	END IF;
	IF rel.relnamespace = 'softmobile'::regnamespace THEN
		RAISE EXCEPTION '% belongs to softmobile itself', "table"
			USING ERRCODE = 'insufficient_privilege', HINT = 'Attach the application''s own tables.';
	END IF;
	IF rel.relpersistence <> 'p' THEN
		RAISE EXCEPTION '% is not a permanent table', "table"
			USING ERRCODE = 'wrong_object_type', DETAIL = 'Rows of temporary and unlogged tables do not survive a crash, but their events would.',
				HINT = 'Use ALTER TABLE ... SET LOGGED, or attach a permanent table.';
	END IF;

	-- Waits for running writers: none of them may still write to the lanes of before.
	EXECUTE format('LOCK TABLE %s IN SHARE ROW EXCLUSIVE MODE', "table");

	IF EXISTS (SELECT FROM softmobile.captured_table c WHERE c.relation = "table") THEN
		RAISE EXCEPTION '% is already attached', "table"
			USING ERRCODE = 'duplicate_object', HINT = format('To change how it is captured, call softmobile.detach(%L) first.', "table"::text);
	END IF;
	SELECT r INTO ancestor FROM softmobile.roots_of(ARRAY["table"::oid]) AS r LIMIT 1;
	IF ancestor IS NOT NULL THEN
		RAISE EXCEPTION '% is already captured through %', "table", ancestor
			USING ERRCODE = 'duplicate_object', HINT = 'Partitions and inheritance children follow their root.';
	END IF;
	IF rel.relispartition THEN
		RAISE EXCEPTION '% is a partition', "table"
			USING ERRCODE = 'wrong_object_type',
				HINT = format('Attach the partitioned table %s; its partitions follow.', (SELECT pg_partition_root("table")::text));
	END IF;

	IF entity_type IS NULL OR entity_type !~ '^[A-Za-z][A-Za-z0-9_-]{0,62}$' THEN
		RAISE EXCEPTION 'entity type "%" cannot be used', coalesce(entity_type, 'NULL')
			USING ERRCODE = 'invalid_parameter_value', HINT = 'Use letters, digits, _ and -, beginning with a letter, at most 63, such as ''sale''.';
	END IF;
	IF upper(priority) NOT IN ('HIGH', 'NORMAL', 'LOW') THEN
		RAISE EXCEPTION 'unknown priority "%"', priority
			USING ERRCODE = 'invalid_parameter_value', HINT = 'Use HIGH, NORMAL or LOW.';
	END IF;
	IF initial IS NULL OR initial NOT IN ('none', 'snapshot') THEN
		RAISE EXCEPTION 'unknown value "%" for initial', initial
			USING ERRCODE = 'invalid_parameter_value', HINT = 'Use ''none'', or ''snapshot'' to queue the rows that are there.';
	END IF;

	IF key IS NULL THEN
		SELECT array_agg(a.attname ORDER BY p.n) INTO key
		FROM pg_index i, unnest(i.indkey[0:i.indnkeyatts - 1]) WITH ORDINALITY AS p (attnum, n)
			JOIN pg_attribute a ON a.attrelid = "table" AND a.attnum = p.attnum
		WHERE i.indrelid = "table" AND i.indisprimary;
		IF key IS NULL THEN
			RAISE EXCEPTION '% has no primary key', "table"
				USING ERRCODE = 'invalid_table_definition', DETAIL = 'Without a key nobody could tell which entity an event is about.',
					HINT = format('Add a primary key, or name the columns: softmobile.attach(%L, %L, key => ARRAY[...]).', "table"::text, entity_type);
		END IF;
	ELSIF cardinality(key) = 0 OR array_position(key, NULL) IS NOT NULL THEN
		RAISE EXCEPTION 'the key of % names no column', "table"
			USING ERRCODE = 'invalid_parameter_value', HINT = 'Leave the key out to use the primary key.';
	END IF;

	FOREACH k IN ARRAY key LOOP
		numbers := numbers || softmobile.check_column("table", k, 'key');
	END LOOP;
	FOREACH k IN ARRAY branches LOOP
		numbers := numbers || softmobile.check_column("table", k, 'branch column');
	END LOOP;
	FOR k, purpose, kind IN
		VALUES (reason_column, 'reason column', NULL), (folio_column, 'folio column', NULL), (amount_column, 'amount column', 'number'),
			(date_column, 'date column', 'date'), (sku_column, 'SKU column', NULL), (quantity_column, 'quantity column', 'number')
	LOOP
		IF k IS NOT NULL THEN
			numbers := numbers || softmobile.check_column("table", k, purpose, kind);
		END IF;
	END LOOP;

	INSERT INTO softmobile.outbox_entity AS e (entity_type, priority, flag)
	SELECT entity_type, coalesce(upper(priority), softmobile.default_priority(entity_type)), softmobile.entity_flag(entity_type)
	WHERE NOT EXISTS (SELECT FROM softmobile.outbox_entity o WHERE o.entity_type = entity_type)
	ON CONFLICT DO NOTHING;
	SELECT e.* INTO STRICT entity FROM softmobile.outbox_entity e WHERE e.entity_type = entity_type FOR UPDATE;
	IF upper(priority) <> entity.priority THEN
		IF EXISTS (SELECT FROM softmobile.captured_table c WHERE c.entity_no = entity.entity_no) THEN
			RAISE EXCEPTION 'entity type "%" has priority %', entity_type, entity.priority
				USING ERRCODE = 'invalid_parameter_value', DETAIL = 'An entity''s events share one lane, so all tables of an entity type have one priority.',
					HINT = format('Use priority => %L, or another entity type.', entity.priority);
		END IF;
		-- Events of this type may still wait in the old lane: what comes now goes into an epoch that is sent after them.
		UPDATE softmobile.outbox_entity e SET priority = upper(priority) WHERE e.entity_no = entity.entity_no;
		PERFORM softmobile.open_epoch(format('priority of %s changed', entity_type));
	END IF;

	INSERT INTO softmobile.captured_table (relation, entity_no, key_columns, branch_columns, reason_column, folio_column, amount_column,
		date_column, sku_column, quantity_column, require_reason, column_numbers, attached_by)
	VALUES ("table", entity.entity_no, key::name[], branches, reason_column, folio_column, amount_column,
		date_column, sku_column, quantity_column, coalesce(require_reason, true), numbers, softmobile.calling_role());
	PERFORM softmobile.captures_changed();
	PERFORM softmobile.cover("table");
	PERFORM softmobile.grant_triggers();

	IF initial = 'snapshot' THEN
		INSERT INTO softmobile.outbox_snapshot (relation, end_block, root, branch_id, actor, reason)
		WITH RECURSIVE tree (relid) AS (
			SELECT "table"::oid
			UNION
			SELECT i.inhrelid FROM pg_inherits i JOIN tree ON i.inhparent = tree.relid)
		SELECT c.oid, pg_relation_size(c.oid) / current_setting('block_size')::bigint, "table",
			current_setting('softmobile.branch_id'), softmobile.calling_role(), softmobile.current_reason()
		FROM tree JOIN pg_class c ON c.oid = tree.relid
		WHERE c.relkind = 'r' AND pg_relation_size(c.oid) > 0;
		PERFORM softmobile.poke();
	END IF;
	PERFORM softmobile.record_audit('attach', NULL, softmobile.current_reason(), NULL, NULL,
		jsonb_build_object('table', "table"::text, 'entity_type', entity_type), softmobile.calling_role());
END
$$;
COMMENT ON FUNCTION softmobile.attach(regclass, text, text[], name, text, boolean, name, name, name, text, name, name, name, name) IS
'Captures a table from now on. key: columns of the entity_id (default: primary key); branch_column, else branch_fallback_column, else softmobile.branch_id names the branch; priority HIGH, NORMAL or LOW (default by entity type); initial ''snapshot'' also queues the rows that are there, LOW. folio_column, amount_column, date_column (when the business says that it happened), sku_column, quantity_column: what folio_control, sync_explain() and reconcile() look at. Waits for running writers of the table. Errors: 42710 attached already, 42809 not a permanent table, 42501 system table, 42703 no such column, 42804 its type, 22023 value, 42P16 no key.';

CREATE FUNCTION softmobile.detach("table" regclass) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
	t record;
	still regclass;
BEGIN
	DELETE FROM softmobile.captured_table c WHERE c.relation = "table";
	IF NOT FOUND THEN
		RAISE EXCEPTION '% is not attached', "table"
			USING ERRCODE = 'undefined_object', HINT = 'SELECT relation FROM softmobile.captured_table lists the attached tables.';
	END IF;
	DELETE FROM softmobile.outbox_snapshot s WHERE s.root = "table";
	PERFORM softmobile.captures_changed();
	FOR t IN
		SELECT g.tgname, g.tgrelid::regclass AS relation
		FROM softmobile.tree_of("table") AS tree JOIN pg_trigger g ON g.tgrelid = tree
		WHERE g.tgparentid = 0 AND g.tgfoid IN ('softmobile.capture()'::regprocedure, 'softmobile.refuse_truncate()'::regprocedure)
	LOOP
		EXECUTE format('DROP TRIGGER %I ON %s', t.tgname, t.relation);
	END LOOP;
	-- A child may be attached by itself, or have another attached parent.
	FOR still IN SELECT softmobile.roots_of(ARRAY(SELECT tree::oid FROM softmobile.tree_of("table") AS tree)) LOOP
		PERFORM softmobile.cover(still);
	END LOOP;
	PERFORM softmobile.grant_triggers();
	PERFORM softmobile.record_audit('detach', NULL, softmobile.current_reason(), NULL, NULL,
		jsonb_build_object('table', "table"::text), softmobile.calling_role());
END
$$;
COMMENT ON FUNCTION softmobile.detach(regclass) IS 'Ends the capture of a table; events that are there already are delivered. Error: 42704 not attached.';

/* DDL on attached tables. */

CREATE FUNCTION softmobile.follow_ddl() RETURNS event_trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	root regclass;
	concerned boolean := false;
BEGIN
	FOR root IN
		SELECT softmobile.roots_of(ARRAY(SELECT d.objid FROM pg_event_trigger_ddl_commands() d WHERE d.classid = 'pg_class'::regclass))
		UNION
		-- ALTER TYPE changes the columns of tables made OF the type, and names none of them.
		SELECT c.relation FROM softmobile.captured_table c JOIN pg_class t ON t.oid = c.relation AND t.reloftype <> 0
		WHERE tg_tag = 'ALTER TYPE'
	LOOP
		concerned := true;
		PERFORM softmobile.follow_renames(root);
		-- In a restore it has no trigger until the dump creates those of all tables.
		IF EXISTS (SELECT FROM pg_trigger g WHERE g.tgrelid = root AND g.tgfoid = 'softmobile.capture()'::regprocedure) THEN
			PERFORM softmobile.cover(root);
		END IF;
	END LOOP;
	IF concerned THEN
		PERFORM softmobile.grant_triggers();
	END IF;
	-- Tables may have left the tree of an attached one; nothing says which.
	IF tg_tag = 'ALTER TABLE' AND EXISTS (SELECT FROM softmobile.captured_table) THEN
		PERFORM softmobile.captures_changed();
	END IF;
END
$$;
COMMENT ON FUNCTION softmobile.follow_ddl() IS 'Event trigger: new partitions and inheritance children of attached tables get their triggers, renamed columns are followed, dropping a column that capture needs is refused.';

CREATE FUNCTION softmobile.note_columns() RETURNS event_trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
	UPDATE softmobile.captured_table c SET column_numbers = now.numbers
	FROM softmobile.captured_table t
		CROSS JOIN LATERAL (
			SELECT array_agg(a.attnum ORDER BY w.n) AS numbers, count(*) = count(a.attnum) AS complete
			FROM unnest(softmobile.named_columns(t)) WITH ORDINALITY AS w (name, n)
				LEFT JOIN pg_attribute a ON a.attrelid = t.relation AND a.attname = w.name AND a.attnum > 0) AS now
	WHERE t.relation = c.relation AND now.complete AND now.numbers <> c.column_numbers;
END
$$;
COMMENT ON FUNCTION softmobile.note_columns() IS 'Event trigger: takes down the numbers of attached tables'' columns before these may be renamed; a restore from a dump changes numbers.';

CREATE FUNCTION softmobile.follow_renames(root regclass) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	c softmobile.captured_table;
	was name[];
	now_called name[];
	gone name;
BEGIN
	SELECT * INTO c FROM softmobile.captured_table t WHERE t.relation = root;
	was := softmobile.named_columns(c);
	-- A name that still exists is right.
	IF NOT EXISTS (SELECT FROM unnest(was) AS w (name)
				   WHERE NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = root AND a.attname = w.name AND a.attnum > 0)) THEN
		RETURN;
	END IF;
	SELECT array_agg(coalesce(same.attname, moved.attname) ORDER BY w.n),
		max(w.name) FILTER (WHERE same.attname IS NULL AND moved.attname IS NULL)
	INTO now_called, gone
	FROM unnest(was) WITH ORDINALITY AS w (name, n)
		LEFT JOIN pg_attribute same ON same.attrelid = root AND same.attname = w.name AND same.attnum > 0
		LEFT JOIN pg_attribute moved ON moved.attrelid = root AND moved.attnum = c.column_numbers[w.n] AND NOT moved.attisdropped;
	IF gone IS NOT NULL THEN
		RAISE EXCEPTION 'cannot drop column "%" of %: softmobile captures by it', gone, root
			USING ERRCODE = 'dependent_objects_still_exist', HINT = format('Call softmobile.detach(%L) first, and attach the table again without that column.', root::text);
	END IF;
	UPDATE softmobile.captured_table t SET
		key_columns = now_called[1:cardinality(c.key_columns)],
		branch_columns = now_called[cardinality(c.key_columns) + 1:cardinality(c.key_columns) + cardinality(c.branch_columns)],
		reason_column = now_called[array_position(was, c.reason_column)],
		folio_column = now_called[array_position(was, c.folio_column)],
		amount_column = now_called[array_position(was, c.amount_column)],
		date_column = now_called[array_position(was, c.date_column)],
		sku_column = now_called[array_position(was, c.sku_column)],
		quantity_column = now_called[array_position(was, c.quantity_column)]
	WHERE t.relation = root;
	PERFORM softmobile.captures_changed();
END
$$;
COMMENT ON FUNCTION softmobile.follow_renames(regclass) IS 'Internal: finds the columns that capture needs again after ALTER TABLE. Error: 2BP01 when one was dropped.';

CREATE FUNCTION softmobile.follow_drop() RETURNS event_trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	gone regclass;
	changed regclass;
BEGIN
	-- While the extension itself goes, its tables are gone already.
	IF to_regclass('softmobile.captured_table') IS NULL THEN
		RETURN;
	END IF;
	FOR gone IN
		DELETE FROM softmobile.captured_table c
		USING pg_event_trigger_dropped_objects() d
		WHERE d.classid = 'pg_class'::regclass AND d.objid = c.relation AND d.objsubid = 0
		RETURNING c.relation
	LOOP
		DELETE FROM softmobile.outbox_snapshot s WHERE s.root = gone;
		PERFORM softmobile.captures_changed();
	END LOOP;
	IF FOUND THEN
		PERFORM softmobile.grant_triggers();
	END IF;
	DELETE FROM softmobile.outbox_snapshot s
	USING pg_event_trigger_dropped_objects() d
	WHERE d.classid = 'pg_class'::regclass AND d.objid = s.relation AND d.objsubid = 0;
	-- Columns that go with something else, such as their type.
	FOR changed IN
		SELECT DISTINCT c.relation
		FROM softmobile.captured_table c JOIN pg_event_trigger_dropped_objects() d
			ON d.classid = 'pg_class'::regclass AND d.objid = c.relation AND d.objsubid > 0
	LOOP
		PERFORM softmobile.follow_renames(changed);
	END LOOP;
END
$$;
COMMENT ON FUNCTION softmobile.follow_drop() IS 'Event trigger: a dropped table is no longer attached; its events are delivered all the same. Error: 2BP01 when a column would go that capture needs.';

CREATE EVENT TRIGGER softmobile_note_columns ON ddl_command_start
	WHEN TAG IN ('ALTER TABLE', 'ALTER TYPE')
	EXECUTE FUNCTION softmobile.note_columns();
COMMENT ON EVENT TRIGGER softmobile_note_columns IS 'So that renamed columns of attached tables are found again.';
CREATE EVENT TRIGGER softmobile_follow_ddl ON ddl_command_end
	WHEN TAG IN ('CREATE TABLE', 'ALTER TABLE', 'ALTER TYPE', 'CREATE TABLE AS', 'SELECT INTO', 'IMPORT FOREIGN SCHEMA')
	EXECUTE FUNCTION softmobile.follow_ddl();
COMMENT ON EVENT TRIGGER softmobile_follow_ddl IS 'Keeps the capture of attached tables complete when their partitions, children and columns change.';
CREATE EVENT TRIGGER softmobile_follow_drop ON sql_drop EXECUTE FUNCTION softmobile.follow_drop();
COMMENT ON EVENT TRIGGER softmobile_follow_drop IS 'Forgets attached tables that are dropped.';
-- In replica mode too, where the capture trigger does not fire: it must find its table as it is once the mode ends.
ALTER EVENT TRIGGER softmobile_note_columns ENABLE ALWAYS;
ALTER EVENT TRIGGER softmobile_follow_ddl ENABLE ALWAYS;
ALTER EVENT TRIGGER softmobile_follow_drop ENABLE ALWAYS;
