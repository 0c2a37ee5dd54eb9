-- attach_softmobile(): the original platform's tables, as different versions of it have them.
\getenv srcdir PG_ABS_SRCDIR
\set ECHO none
\i :srcdir/test/regress/prelude.sql
\set ECHO all
SET client_min_messages = warning;
\pset format unaligned
\pset fieldsep ' | '
\pset tuples_only on
SELECT * FROM failure($$SELECT * FROM softmobile.attach_softmobile('no_such_schema')$$);
SELECT * FROM failure($$SELECT * FROM softmobile.attach_softmobile(NULL)$$);
SELECT * FROM failure($$SELECT * FROM softmobile.attach_softmobile('shop', initial => 'all')$$);
-- nothing of it is there
SELECT * FROM softmobile.attach_softmobile();
SELECT count(*) FROM softmobile.captured_table;

-- its names in Spanish; not all of its tables
CREATE TABLE ventas (id_venta integer PRIMARY KEY, sucursal_id integer NOT NULL, cliente_id integer, document_number varchar(64), subtotal numeric(12, 2), total numeric(12, 2), fecha timestamptz);
CREATE TABLE detalle_ventas (id_detalle integer PRIMARY KEY, venta_id integer REFERENCES ventas, producto_id integer, quantity integer, subtotal numeric(12, 2));
CREATE TABLE sale_returns (id integer PRIMARY KEY, venta_id integer REFERENCES ventas, device_id integer, quantity integer, reason varchar(255), created_at timestamptz);
CREATE TABLE inventory_movements (id integer PRIMARY KEY, sucursal_destino_id integer, sucursal_origen_id integer, producto_id integer, cantidad integer, comentario text, fecha timestamptz);
CREATE TABLE stock_moves (id integer PRIMARY KEY, product_id integer, branch_id integer, quantity numeric(14, 4), reference text, "timestamp" timestamptz);
CREATE TABLE devices (id integer PRIMARY KEY, sucursal_id integer, sku text, quantity integer, fecha_compra date);
CREATE TABLE repair_orders (id integer PRIMARY KEY, sucursal_id integer, customer_id integer, total_cost numeric(12, 2), opened_at timestamptz);
CREATE TABLE repair_order_parts (id integer PRIMARY KEY, repair_order_id integer REFERENCES repair_orders, device_id integer, quantity integer);
CREATE TABLE transfer_orders (id integer PRIMARY KEY, origin_store_id integer, destination_store_id integer, status text, reason text, created_at timestamptz);
CREATE TABLE clientes (id_cliente integer PRIMARY KEY, nombre text);
CREATE TABLE pos_configs (sucursal_id integer PRIMARY KEY, invoice_prefix text);
CREATE TABLE sucursales (id_sucursal integer PRIMARY KEY, nombre text);
CREATE TABLE cash_register_sessions (id integer PRIMARY KEY, sucursal_id integer, opened_at timestamptz, closed_at timestamptz);
SELECT * FROM softmobile.attach_softmobile('shop');
SELECT relation, key_columns, branch_columns, reason_column, folio_column, amount_column, date_column, sku_column, quantity_column
FROM softmobile.captured_table ORDER BY relation::text;
-- again
SELECT table_name, attached, detail FROM softmobile.attach_softmobile('shop');
SELECT count(*), count(*) FILTER (WHERE action = 'attach') FROM softmobile.sync_audit WHERE action ~ 'attach';

-- what its rows become
BEGIN;
SELECT softmobile.set_reason('venta de mostrador');
INSERT INTO ventas VALUES (1, 7, NULL, 'A-1', 100, 116, '2026-01-31 12:00+00');
INSERT INTO detalle_ventas VALUES (1, 1, 4, 2, 100);
INSERT INTO inventory_movements VALUES (1, NULL, 7, 4, -2, 'salida', now());
INSERT INTO transfer_orders VALUES (1, NULL, 8, 'SOLICITADA', NULL, now());
INSERT INTO sucursales VALUES (7, 'Norte');
COMMIT;
-- a return says why by itself
INSERT INTO sale_returns VALUES (1, 1, 4, 1, 'pantalla con defecto', now());
SELECT message FROM failure($$INSERT INTO sale_returns VALUES (2, 1, 4, 1, 'no', now())$$);
SELECT lane, entity, id, branch, reason, folio, amount FROM fresh();

-- other names, and all that can go wrong with a table
CREATE SCHEMA "Otra tienda";
SET search_path = "Otra tienda", shop;
CREATE TABLE ventas (id integer PRIMARY KEY, store_id integer, folio text, total text, total_amount numeric, sold_at text, created_at date) PARTITION BY RANGE (id);
CREATE TABLE ventas_1 PARTITION OF ventas FOR VALUES FROM (0) TO (100);
CREATE TABLE all_lines (id integer, venta_id integer) PARTITION BY RANGE (id);
CREATE TABLE detalle_ventas PARTITION OF all_lines FOR VALUES FROM (0) TO (100);
CREATE VIEW sale_returns AS SELECT * FROM ventas;
CREATE TABLE inventory_movements (sku text, qty numeric, store_id text);
CREATE UNLOGGED TABLE stock_moves (id integer PRIMARY KEY);
CREATE TABLE things (id integer PRIMARY KEY, sku text, stock integer);
CREATE TABLE devices () INHERITS (things);
CREATE TABLE repair_orders (id integer PRIMARY KEY, folio text, "Total" numeric);
CREATE TABLE purchase_orders (id integer PRIMARY KEY, store_id integer, numero_factura text, monto_total double precision, fecha date);
CREATE SEQUENCE clientes;
CREATE TABLE suppliers (id integer PRIMARY KEY);
SELECT softmobile.attach('suppliers', 'proveedor', priority => 'LOW'), softmobile.attach('things', 'thing');
SELECT * FROM softmobile.attach_softmobile('Otra tienda');
-- mended, then once more
ALTER TABLE inventory_movements ADD PRIMARY KEY (sku);
ALTER TABLE stock_moves SET LOGGED;
SELECT table_name, attached, detail FROM softmobile.attach_softmobile('Otra tienda') WHERE table_name ~ 'inventory|stock';
-- rolled back with its transaction
CREATE SCHEMA third;
CREATE TABLE third.ventas (id integer PRIMARY KEY);
INSERT INTO third.ventas VALUES (1);
BEGIN;
SELECT attached, detail FROM softmobile.attach_softmobile('third', initial => 'snapshot') WHERE table_name = 'third.ventas';
SELECT root, end_block FROM softmobile.outbox_snapshot;
ROLLBACK;
SELECT count(*) FROM softmobile.captured_table WHERE relation = 'third.ventas'::regclass;
SELECT count(*) FROM pg_trigger WHERE tgrelid = 'third.ventas'::regclass;
SHOW lock_timeout;
DROP SCHEMA "Otra tienda", third CASCADE;
